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
    """Those that the DeepSpeed JSON switches on, ``master`` its ``MonitorMaster``. On ranks but 0 nothing happens."""

    def __init__(self, master: Any):
        self._master = master

    @property
    def enabled(self) -> bool:
        """Whether any is, on this rank."""
        return ranks.rank() == 0 and bool(self._master.enabled)

    def write(self, scalars: list[Scalar]) -> None:
        """Show scalars in all of them."""
        if self.enabled:
            self._master.write_events(scalars)

    @property
    def tensorboard(self) -> SummaryWriter | None:
        """TensorBoard's writer; ``None`` on other ranks, where the JSON switches it off, or where it failed."""
        board = self._master.tb_monitor
        return board.summary_writer if board is not None and board.enabled else None

    def write_tensorboard(self, scalars: list[Scalar]) -> None:
        """Show scalars in TensorBoard alone."""
        if self.tensorboard is not None:
            self._master.tb_monitor.write_events(scalars)


@contextmanager
def optional_monitors() -> Iterator[None]:
    """While a DeepSpeed engine is made: a monitor that cannot write is warned of and left out, and one that fails later
    is switched off. DeepSpeed itself writes to them in every step, so their errors would end training."""
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
    """DeepSpeed's own events count the micro-batches of all ranks, all others global steps."""
    tag, value, step = event
    return tag, value, step // ranks.world_size() if tag.startswith("Train/Samples/") else step


def _warn(original: Any, settings: Any, error: Exception) -> None:
    log.debug("where it came from", exc_info=True)
    folder = Path(getattr(settings, "output_path", ""), getattr(settings, "job_name", ""))
    log.warning(
        "%s of DeepSpeed could not write to %s (%s: %s); training goes on without it, metrics.jsonl has the numbers",
        original.__name__, folder, type(error).__name__, error,
    )  # fmt: skip
