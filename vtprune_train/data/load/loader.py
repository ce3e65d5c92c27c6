"""Yields the batches of global steps in the planner's order, decoded by worker processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from vtprune_train.core.stream import PackedBatch
from vtprune_train.data.load.collate import Collator
from vtprune_train.data.load.workers import DecodePool, MicroBatch
from vtprune_train.data.plan.planner import Planner, StepPlan

PREFETCH = 4


@dataclass(frozen=True)
class _Decode:
    """Makes the batch of a task, in a worker."""

    collate: Collator
    max_tokens: int

    def __call__(self, task: MicroBatch) -> PackedBatch:
        batch = self.collate(task.samples, task.image_samples, step=task.step)
        if task.image_samples is None:  # images of other samples change the length
            assert batch.plan.stages[0].num_tokens <= self.max_tokens, "the micro-batch exceeds data.max_tokens"
        return batch


class StepLoader:
    """Iterates once over ``(plan, batches)`` of global steps ``[first_step, end_step)`` for one rank.

    Args:
        collate: makes batches; it is pickled and runs in the workers, which the constructor starts.
        planner: plans the steps.
        workers: number of decode processes; 0 decodes in this process.
        device: batches for CUDA are pinned.
        image_samples: for each sample, the sample whose images it gets; ``None`` for its own.
        prefetch: batches that each worker decodes ahead.
        timeout: seconds after which a worker counts as hung; ``None`` for no limit.

    ``ready`` is the smallest number of decoded batches that were available when the last step requested one; ``None``
    without workers.
    """

    def __init__(
        self,
        collate: Collator,
        planner: Planner,
        *,
        first_step: int,
        end_step: int,
        rank: int,
        workers: int,
        device: torch.device,
        image_samples: Sequence[int] | None = None,
        prefetch: int = PREFETCH,
        timeout: float | None = None,
    ):
        self.steps = range(first_step, end_step)
        self.planner, self.rank, self.image_samples = planner, rank, image_samples
        self.decode = _Decode(collate, planner.max_tokens)
        self.pin = device.type == "cuda"
        self.ready: int | None = None
        self._planned: deque[StepPlan] = deque()
        self._pool: DecodePool | None = None
        if workers and self.steps:
            self._pool = DecodePool(
                self.decode, self._order(), workers, prefetch, timeout, pin=self.pin,
                names=lambda task: [collate.index.sample_id(sample) for sample in task.samples],
            )  # fmt: skip

    def __iter__(self) -> Iterator[tuple[StepPlan, list[PackedBatch]]]:
        if self._pool is None:
            for step in self.steps:
                plan = self.planner.plan(step)
                batches = [self.decode(task) for task in self._tasks(plan)]
                yield plan, [batch.pin_memory() for batch in batches] if self.pin else batches
            return
        try:
            for _ in self.steps:
                yield self._next_step(self._pool)
        finally:
            self._pool.close()

    def _next_step(self, pool: DecodePool) -> tuple[StepPlan, list[PackedBatch]]:
        plan = self._planned.popleft()
        batches, ready = [], []
        for _ in plan.micro_batches:
            batch = pool.next()
            assert batch is not None, "there are as many batches as tasks"
            batches.append(batch)
            ready.append(pool.ready)
        self.ready = min(ready)
        return plan, batches

    def _order(self) -> Iterator[MicroBatch]:
        """All tasks in order; a step's plan is stored before its first task."""
        for step in self.steps:
            plan = self.planner.plan(step)
            self._planned.append(plan)
            yield from self._tasks(plan)

    def _tasks(self, plan: StepPlan) -> Iterator[MicroBatch]:
        for ranks in plan.micro_batches:
            samples = ranks[self.rank]
            images = None if self.image_samples is None else tuple(self.image_samples[sample] for sample in samples)
            yield MicroBatch(plan.step, samples, images)
