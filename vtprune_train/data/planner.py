"""Global steps: which samples, and how they are dealt to ranks and micro-steps.

A step's samples depend on seed and epoch alone, so they are the same at any world size and the data position is the
global step. How they are dealt is :mod:`vtprune_train.data.dealing`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vtprune_train.data.dealing import MicroBatches, deal


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: ``micro_batches[m][r]`` holds the sample indices of rank r in micro-step m."""

    step: int
    epoch: int
    samples: tuple[int, ...]
    micro_batches: MicroBatches


class Planner:
    """Plans global steps.

    Args:
        num_samples: samples of an epoch.
        measure: ``(step, samples)`` to [samples] tokens before dropping and [samples] FLOPs after it (any unit).
        global_batch_size: samples a step; the last step of an epoch takes what is left.
        max_tokens: most tokens (before dropping) of a micro-batch.
        seed: decides the order together with the epoch.
        world_size: ranks.

    Raises:
        ValueError: there are no samples.
    """

    REMEMBERED = 32  # plans: the loader runs ahead of the loop, and both ask

    def __init__(
        self,
        num_samples: int,
        measure: Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray]],
        *,
        global_batch_size: int,
        max_tokens: int,
        seed: int,
        world_size: int,
    ):
        if not num_samples:
            raise ValueError("there are no samples to train on")
        self.num_samples, self.measure = num_samples, measure
        self.global_batch_size, self.max_tokens = global_batch_size, max_tokens
        self.seed, self.world_size = seed, world_size
        self._order: tuple[int, np.ndarray] | None = None
        self._plans: dict[int, StepPlan] = {}

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.global_batch_size)

    def plan(self, step: int) -> StepPlan:
        """The plan of global step ``step``, counted from 0 over all epochs.

        Raises:
            ValueError: a sample of the step is longer than ``max_tokens``.
        """
        if step not in self._plans:
            while len(self._plans) >= self.REMEMBERED:
                del self._plans[next(iter(self._plans))]
            self._plans[step] = self._plan(step)
        return self._plans[step]

    def _plan(self, step: int) -> StepPlan:
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch_size
        samples = self._epoch_order(epoch)[start : start + self.global_batch_size]
        dealt = deal(*self.measure(step, samples), self.world_size, self.max_tokens)
        numbers = samples.tolist()
        micro_batches = tuple(tuple(tuple(numbers[i] for i in rank) for rank in ranks) for ranks in dealt)
        return StepPlan(step, epoch, tuple(numbers), micro_batches)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.num_samples))
        return self._order[1]


def data_digest(sample_ids: Sequence[str]) -> str:
    """A hash of a step's sample ids, in order; equal digests mean equal samples."""
    return hashlib.sha256("\n".join(sample_ids).encode()).hexdigest()[:16]
