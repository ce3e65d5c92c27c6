"""Traces selected steps."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch.profiler import profile, schedule

from vtprune_train.training import distributed as ranks
from vtprune_train.training.loop.callback import Callback, Trainer
from vtprune_train.training.loop.callbacks.optional import only_warning

log = logging.getLogger(__name__)


class Profiler(Callback):
    """Traces steps with ``torch.profiler``, on every rank, into ``RUN/profile/``. The step before them warms the
    profiler up. Open the traces in https://ui.perfetto.dev or ``chrome://tracing``.

    Args:
        steps: first and last step to trace, counted from 1, for example ``[10, 12]``.
        record_shapes, profile_memory, with_stack: as in ``torch.profiler.profile``.
    """

    def __init__(
        self, steps: list[int], record_shapes: bool = False, profile_memory: bool = False, with_stack: bool = False
    ):
        two = isinstance(steps, list) and len(steps) == 2 and all(type(step) is int for step in steps)
        if not two or not 1 <= steps[0] <= steps[1]:
            raise ValueError(f"steps={steps!r} is not the first and the last step to trace, for example [10, 12]")
        self.first, self.last = steps
        self.options: dict[str, Any] = {
            "record_shapes": record_shapes,
            "profile_memory": profile_memory,
            "with_stack": with_stack,
        }
        self._profile: Any = None
        self._step = 0  # the last one completed

    def on_start(self, trainer: Trainer) -> None:
        self._start_before(trainer.state.step + 1, trainer.config.run_dir / "profile")

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self._step = metrics["step"]
        if self._profile is not None:
            self._profile.step()
            if metrics["step"] >= self.last:
                self._stop()
        else:
            self._start_before(metrics["step"] + 1, trainer.config.run_dir / "profile")

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        self._stop()

    def on_error(self, trainer: Trainer, error: Exception) -> None:
        self._stop()

    def _start_before(self, step: int, folder: Path) -> None:
        """Start the profiler if ``step``, the next one, is its warm-up step or is to be traced."""
        if not self.first - 1 <= step <= self.last:
            return
        first = max(step, self.first)
        self._profile = profile(
            schedule=schedule(wait=0, warmup=first - step, active=self.last - first + 1, repeat=1),
            on_trace_ready=lambda trace: self._export(trace, folder, first),
            **self.options,
        )
        self._profile.start()

    def _stop(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _export(self, trace: Any, folder: Path, first: int) -> None:
        if self._step < first:  # training stopped before the first step to trace was complete
            return
        path = folder / f"steps_{first}_to_{self._step}_rank_{ranks.rank()}.json.gz"
        with only_warning(path):
            folder.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(path))
            if ranks.rank() == 0:
                log.info("wrote the trace %s; open it in https://ui.perfetto.dev", path)
