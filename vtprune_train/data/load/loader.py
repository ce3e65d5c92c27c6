"""Batches of global steps, in the planner's order, decoded by worker processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from vtprune_train.core.stream import PackedBatch
from vtprune_train.data.load.collate import Collator
from vtprune_train.data.load.workers import DecodePool, MicroBatch
from vtprune_train.data.plan.planner import Planner, StepPlan

PREFETCH = 4


class StepLoader:
    """Iterates once over ``(plan, batches)`` of global steps ``[first_step, end_step)`` for one rank.

    Its workers are forked here: make it before anything that starts threads.

    Args:
        collate: samples to batches; runs in the workers.
        planner: which samples.
        rank: this rank.
        workers: decode processes; 0 decodes in this one.
        device: batches for CUDA are pinned.
        pictures_of: whose pictures each sample gets, by sample index; its own if ``None``.
        prefetch: batches that each worker decodes ahead.
        timeout: seconds after which a worker counts as hung; ``None``: never.

    ``ready`` is the least number of decoded batches that lay ready when the last step asked for one; ``None`` without
    workers.
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
        pictures_of: Sequence[int] | None = None,
        prefetch: int = PREFETCH,
        timeout: float | None = None,
    ):
        self.steps = range(first_step, end_step)
        self.collate, self.planner, self.rank, self.pictures_of = collate, planner, rank, pictures_of
        self.device = device
        self.ready: int | None = None
        self._planned: deque[StepPlan] = deque()
        self._pool: DecodePool | None = None
        if workers and self.steps:
            self._pool = DecodePool(
                self._decode, self._order(), workers=workers, prefetch=prefetch, timeout=timeout, names=self._names
            )

    def __iter__(self) -> Iterator[tuple[StepPlan, list[PackedBatch]]]:
        if self._pool is None:
            for step in self.steps:
                plan = self.planner.plan(step)
                batches = [self._decode(task) for task in self._tasks(plan)]
                yield plan, [batch.pin_memory() for batch in batches] if self.device.type == "cuda" else batches
            return
        pinned = _Pinned(self._pool, self.device) if self.device.type == "cuda" else None
        try:
            for _ in self.steps:
                yield self._next_step(self._pool, self._pool.next if pinned is None else pinned.next)
        finally:
            self._pool.kill()
            if pinned is not None:
                pinned.close()
            self._pool.close()

    def _next_step(
        self, pool: DecodePool, next_batch: Callable[[], PackedBatch | None]
    ) -> tuple[StepPlan, list[PackedBatch]]:
        plan = self._planned.popleft()
        batches, ready = [], []
        for _ in plan.micro_batches:
            batch = next_batch()
            assert batch is not None, "as many batches as tasks"
            batches.append(batch)
            ready.append(pool.ready)
        self.ready = min(ready)
        return plan, batches

    def _order(self) -> Iterator[MicroBatch]:
        """All tasks; each step's plan is noted when its first one is asked for."""
        for step in self.steps:
            plan = self.planner.plan(step)
            self._planned.append(plan)
            yield from self._tasks(plan)

    def _tasks(self, plan: StepPlan) -> Iterator[MicroBatch]:
        for ranks in plan.micro_batches:
            samples = ranks[self.rank]
            pictures = None if self.pictures_of is None else tuple(self.pictures_of[sample] for sample in samples)
            yield MicroBatch(plan.step, samples, pictures)

    def _decode(self, task: MicroBatch) -> PackedBatch:
        batch = self.collate(task.samples, task.pictures_of, step=task.step)
        if task.pictures_of is None:  # pictures of other samples have other lengths
            assert batch.plan.stages[0].num_tokens <= self.planner.max_tokens, "a micro-batch beyond data.max_tokens"
        return batch

    def _names(self, task: MicroBatch) -> list[str]:
        return [self.collate.index.sample_id(sample) for sample in task.samples]


class _Pinned:
    """One batch ahead in pinned memory, copied there by a thread while the one before it is trained on."""

    def __init__(self, pool: DecodePool, device: torch.device):
        self.pool = pool
        self.thread = ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(device,))
        self.ahead = self.thread.submit(self._pin)

    def next(self) -> PackedBatch | None:
        batch = self.ahead.result()
        self.ahead = self.thread.submit(self._pin)
        return batch

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)

    def _pin(self) -> PackedBatch | None:
        batch = self.pool.next()
        return None if batch is None else batch.pin_memory()
