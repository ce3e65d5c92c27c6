"""Garbage collection at the same steps on all ranks."""

from __future__ import annotations

import gc
from typing import Any

from vtprune_train.training.loop.callback import Callback, Trainer


class GarbageCollection(Callback):
    """Turns Python's automatic garbage collection off and collects every ``every`` steps on all ranks together, so that
    no rank waits for a collection of another. Restores the automatic collection at the end."""

    def __init__(self, every: int = 100):
        if type(every) is not int or every < 1:
            raise ValueError(f"every={every!r} is not a positive number of steps")
        self.every = every
        self._was_enabled = False

    def on_start(self, trainer: Trainer) -> None:
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        if metrics["step"] % self.every == 0:
            gc.collect()

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        self._restore()

    def on_error(self, trainer: Trainer, error: Exception) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._was_enabled:
            gc.enable()
