"""A rank's batches of each step, with the time it waited for them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vtprune_train.core.stream import PackedBatch
from vtprune_train.data.load.loader import StepLoader
from vtprune_train.data.plan.planner import StepPlan


@dataclass
class Fetched:
    """This rank's micro-batches of a global step and the seconds spent waiting for them; see ``StepLoader.ready`` for
    ``batches_ready``."""

    plan: StepPlan
    batches: Sequence[PackedBatch]
    data_wait: float
    batches_ready: int | None


def fetched(loader: StepLoader) -> Iterator[Fetched]:
    """Yield the loader's steps with the time spent waiting for each."""
    began = time.perf_counter()
    for plan, batches in loader:
        yield Fetched(plan, batches, time.perf_counter() - began, loader.ready)
        began = time.perf_counter()
