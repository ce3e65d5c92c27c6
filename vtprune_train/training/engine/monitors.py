"""DeepSpeed's monitors (TensorBoard, wandb, CSV, Comet), whose errors do not stop training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune_train.training import distributed as ranks
from vtprune_train.training.engine.private import MODULES

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

Scalar = tuple[str, float, int]


class Monitors:
    """The monitors enabled in the DeepSpeed JSON; ``master`` is DeepSpeed's ``MonitorMaster``. Does nothing on ranks
    other than 0."""

    def __init__(self, master: Any):
        self._master = master

    @property
    def enabled(self) -> bool:
        """Whether any monitor is enabled on this rank."""
        return ranks.rank() == 0 and bool(self._master.enabled)

    def write(self, scalars: list[Scalar]) -> None:
        """Write scalars to all monitors."""
        if self.enabled:
            self._master.write_events(scalars)

    @property
    def tensorboard(self) -> SummaryWriter | None:
        """TensorBoard's writer; ``None`` on other ranks, if it is disabled in the JSON, or if it failed."""
        board = self._master.tb_monitor
        return board.summary_writer if board is not None and board.enabled else None

    def write_tensorboard(self, scalars: list[Scalar]) -> None:
        """Write scalars to TensorBoard only."""
        if self.tensorboard is not None:
            self._master.tb_monitor.write_events(scalars)


@contextmanager
def optional_monitors() -> Iterator[None]:
    """Context manager for creating a DeepSpeed engine. A monitor that cannot write is skipped with a warning, and one
    that fails later is disabled. Otherwise their errors would stop training, because DeepSpeed writes to them in every
    step."""
    from deepspeed.monitor import monitor as deepspeed_monitor

    originals = {kind: getattr(deepspeed_monitor, kind) for kind in MODULES[deepspeed_monitor.__name__]}
    for kind, original in originals.items():
        setattr(deepspeed_monitor, kind, _optional(original))
    try:
        yield
    finally:
        for kind, original in originals.items():
            setattr(deepspeed_monitor, kind, original)


def _optional(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def make(settings: Any) -> Any:
        try:
            monitor = original(settings)
        except OSError as error:
            _warn(original, settings, error)
            return None
        write = monitor.write_events

        def guarded(events: list[Scalar]) -> None:
            try:
                write([_by_global_step(event) for event in events])
            except Exception as error:
                monitor.enabled = False
                _warn(original, settings, error)

        monitor.write_events = guarded
        return monitor

    return make


def _by_global_step(event: Scalar) -> Scalar:
    """Convert the step of an event to global steps; DeepSpeed's own events count the micro-batches of all ranks."""
    tag, value, step = event
    return tag, value, step // ranks.world_size() if tag.startswith("Train/Samples/") else step


def _warn(original: Any, settings: Any, error: Exception) -> None:
    log.debug("traceback", exc_info=True)
    folder = Path(getattr(settings, "output_path", ""), getattr(settings, "job_name", ""))
    log.warning(
        "%s of DeepSpeed could not write to %s (%s: %s); training continues without it, metrics.jsonl has the numbers",
        original.__name__, folder, type(error).__name__, error,
    )  # fmt: skip
