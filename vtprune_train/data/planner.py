"""Global steps: which samples, and how they are dealt to ranks and micro-steps.

A step's samples depend on seed and epoch alone, so they are the same at any world size and the data position is the
global step. Dealing looks at two limits: tokens BEFORE dropping bound memory, cost AFTER dropping is what ranks share
evenly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vtprune_train.data.order import EpochOrder


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: ``micro_batches[m][r]`` holds the sample indices of rank r in micro-step m."""

    step: int
    epoch: int
    samples: tuple[int, ...]
    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]


class Planner:
    """Plans global steps.

    Args:
        order: which sample stands where in each epoch.
        tokens_and_costs: of given samples [S], their tokens before dropping [S] and FLOPs after it [S] (any unit).
        longest: tokens of the longest sample.
        global_batch_size: samples a step; the last step of an epoch takes what is left.
        max_tokens: most tokens (before dropping) of a micro-batch.
        world_size: ranks.

    Raises:
        ValueError: no samples, or one that is longer than ``max_tokens``.
    """

    def __init__(
        self,
        order: EpochOrder,
        tokens_and_costs: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
        *,
        longest: int,
        global_batch_size: int,
        max_tokens: int,
        world_size: int,
    ):
        if not len(order):
            raise ValueError("there are no samples to train on")
        if longest > max_tokens:
            raise ValueError(
                f"data.max_tokens={max_tokens} is smaller than the longest sample ({longest} tokens); "
                "raise it, or lower data.max_length and set data.too_long=skip"
            )
        self.order, self.tokens_and_costs = order, tokens_and_costs
        self.global_batch_size, self.max_tokens = global_batch_size, max_tokens
        self.world_size = world_size

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.order) // self.global_batch_size)

    def plan(self, step: int) -> StepPlan:
        """The plan of global step ``step``, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch_size
        samples = self.order.samples(epoch, start, start + self.global_batch_size)
        return StepPlan(step, epoch, tuple(samples.tolist()), self._deal(samples))

    def _deal(self, samples: np.ndarray) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Fewest micro-steps that fit; the costliest sample first to the cheapest micro-batch with room."""
        tokens, costs = self.tokens_and_costs(samples)
        order = np.argsort(-costs, kind="stable")
        micro_steps = max(1, -(-int(tokens.sum()) // (self.max_tokens * self.world_size)))
        while (bins := self._fill(order, tokens, costs, micro_steps * self.world_size)) is None:
            micro_steps += 1
        bins.sort(key=lambda chosen: -float(costs[chosen].sum()))
        # Neighbours in cost share a micro-step: ranks wait for each other at its end.
        return tuple(
            tuple(tuple(samples[chosen].tolist()) for chosen in bins[m * self.world_size : (m + 1) * self.world_size])
            for m in range(micro_steps)
        )

    def _fill(self, order: np.ndarray, tokens: np.ndarray, costs: np.ndarray, num_bins: int) -> list[list[int]] | None:
        """The bins' positions in the step; ``None`` if there are too few bins."""
        bins: list[list[int]] = [[] for _ in range(num_bins)]
        cost, room = np.zeros(num_bins), np.full(num_bins, self.max_tokens)
        for place in order.tolist():
            fits = room >= tokens[place]
            if not fits.any():
                return None
            chosen = int(np.argmin(np.where(fits, cost, np.inf)))
            bins[chosen].append(place)
            cost[chosen] += costs[place]
            room[chosen] -= tokens[place]
        return bins


def data_digest(sample_ids: Sequence[str]) -> str:
    """A hash of a step's sample ids, in order; equal digests mean equal samples."""
    return hashlib.sha256("\n".join(sample_ids).encode()).hexdigest()[:16]
