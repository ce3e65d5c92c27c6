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
    """This rank's batches of a global step, one for each micro-step, and the seconds it waited for them; for
    ``batches_ready`` see ``StepLoader.ready``."""

    plan: StepPlan
    batches: Sequence[PackedBatch]
    data_wait: float
    batches_ready: int | None


def fetched(loader: StepLoader) -> Iterator[Fetched]:
    """The loader's steps, each with the time from asking for it to having it."""
    began = time.perf_counter()
    for plan, batches in loader:
        yield Fetched(plan, batches, time.perf_counter() - began, loader.ready)
        began = time.perf_counter()
