"""The trackers of ``train.trackers`` (TensorBoard, Weights & Biases, ...), through accelerate's classes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune_train.config.errors import ConfigError, did_you_mean
from vtprune_train.config.settings import Config
from vtprune_train.training import distributed as ranks

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

PROJECT = "vtprune"  # unless WANDB_PROJECT names another


def check_trackers(config: Config) -> None:
    """Raise a ``ConfigError`` if ``train.trackers`` names one that is unknown or not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, installed = list(LOGGER_TYPE_TO_CLASS), {str(name) for name in get_available_trackers()}
    for name in config.train.trackers:
        if name not in known:
            raise ConfigError(f"train.trackers: unknown tracker {name!r}{did_you_mean(name, known)}")
        if name not in installed:
            raise ConfigError(f"train.trackers: {name} is not installed; pip install {name}, or remove it")


class Trackers:
    """Sends numbers and images to all trackers of a run. On ranks other than 0 nothing happens.

    A tracker that fails (a full disk, no network) is disabled with a warning, and training continues.
    """

    def __init__(self, config: Config):
        self.names: list[str] = config.train.trackers
        self.config = config
        self.run_ids: dict[str, str] = {}  # by tracker: the id that a resumed run continues
        self._running: dict[str, Any] = {}

    def start(self) -> None:
        """Start all of them. Weights & Biases continues the run in ``run_ids``."""
        if ranks.rank() or not self.names:
            return
        from accelerate import PartialState
        from accelerate.utils import clear_environment

        with clear_environment():  # accelerate's trackers need its state: one of a single process
            PartialState(cpu=True)
        for name in self.names:
            self._try(name, self._start)

    def _start(self, name: str) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        make = LOGGER_TYPE_TO_CLASS[name]
        project = "tensorboard" if name == "tensorboard" else os.environ.get("WANDB_PROJECT", PROJECT)
        folder = [str(self.config.run_dir)] if make.requires_logging_directory else []
        tracker = make(project, *folder, **(self._wandb_options() if name == "wandb" else {}))
        tracker.start()
        self._running[name] = tracker
        if name == "wandb":
            self.run_ids[name] = tracker.tracker.id

    def _wandb_options(self) -> dict[str, Any]:
        return {
            "name": os.environ.get("WANDB_NAME", self.config.run.name),
            "dir": str(self.config.run_dir),
            "id": self.run_ids.get("wandb"),
            "resume": "allow",
            "config": self.config.model_dump(mode="json"),
        }

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers of a step, by name."""
        for name in list(self._running):
            self._try(name, lambda name: self._running[name].log(dict(values), step=step))

    def log_images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        """Send images, [height, width, 3] uint8, by name; trackers that do not support images ignore them."""

        def send(name: str) -> None:
            tracker, layout = self._running[name], {"dataformats": "NHWC"} if name == "tensorboard" else {}
            if hasattr(tracker, "log_images"):
                tracker.log_images({tag: pixels[None] for tag, pixels in images.items()}, step=step, **layout)

        for name in list(self._running):
            self._try(name, send)

    def with_tensorboard(self, act: Callable[[Any], None]) -> None:
        """Call ``act`` with TensorBoard's ``SummaryWriter`` if TensorBoard is one of the trackers."""
        if "tensorboard" in self._running:
            self._try("tensorboard", lambda name: act(self._running[name].writer))

    def finish(self, failed: bool = False) -> None:
        """Close all of them; Weights & Biases marks a ``failed`` run."""

        def close(name: str) -> None:
            tracker = self._running[name]
            if name == "wandb" and failed:
                tracker.tracker.finish(exit_code=1)
            else:
                tracker.finish()

        for name in list(self._running):
            self._try(name, close)
        self._running.clear()

    def _try(self, name: str, act: Callable[[str], None]) -> None:
        try:
            act(name)
        except Exception as error:
            self._running.pop(name, None)
            log.debug("traceback", exc_info=True)
            place = Path(self.config.run_dir, "tensorboard") if name == "tensorboard" else name
            log.warning(
                "could not write to %s (%s: %s); training continues without it, and metrics.jsonl has every number",
                place, type(error).__name__, error,
            )  # fmt: skip
