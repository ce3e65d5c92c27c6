"""Plans global steps: the samples of a step and their distribution to ranks and micro-steps.

The samples of a step depend only on seed and epoch, so they are the same at any world size, and the global step alone
gives the position in the data. :mod:`vtprune_train.data.plan.dealing` distributes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vtprune_train.core.flops import TrainingCost, layers_per_stage, stage_lengths
from vtprune_train.data.index import SampleIndex
from vtprune_train.data.order import EpochOrder
from vtprune_train.data.plan.dealing import MicroBatches, deal
from vtprune_train.pruning.phases import Phases


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: ``micro_batches[m][r]`` has the sample indices of rank r in micro-step m."""

    step: int
    epoch: int
    samples: tuple[int, ...]
    micro_batches: MicroBatches


class Planner:
    """Plans global steps.

    Args:
        measure: ``(step, samples) -> (tokens, costs)``, [samples] tokens before dropping and [samples] cost after
            dropping, in any unit.
        longest: length of the longest sample in tokens.
        global_batch_size: samples per step; the last step of an epoch takes the remaining ones.
        max_tokens: maximum tokens (before dropping) of a micro-batch.

    Raises:
        ValueError: there are no samples, or one is longer than ``max_tokens``.
    """

    REMEMBERED = 32  # cached plans: the loader runs ahead of the training loop, and both use them

    def __init__(
        self,
        order: EpochOrder,
        measure: Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray]],
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
        self.order, self.measure = order, measure
        self.global_batch_size, self.max_tokens = global_batch_size, max_tokens
        self.world_size = world_size
        self._plans: dict[int, StepPlan] = {}

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.order) // self.global_batch_size)

    def plan(self, step: int) -> StepPlan:
        """The plan of global step ``step``, counted from 0 across epochs."""
        if step not in self._plans:
            while len(self._plans) >= self.REMEMBERED:
                del self._plans[next(iter(self._plans))]
            self._plans[step] = self._plan(step)
        return self._plans[step]

    def _plan(self, step: int) -> StepPlan:
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch_size
        samples = self.order.samples(epoch, start, start + self.global_batch_size)
        dealt = deal(*self.measure(step, samples), self.world_size, self.max_tokens)
        numbers = samples.tolist()
        micro_batches = tuple(tuple(tuple(numbers[i] for i in rank) for rank in ranks) for ranks in dealt)
        return StepPlan(step, epoch, tuple(numbers), micro_batches)


@dataclass(frozen=True)
class StepCosts:
    """Computes tokens and costs of a step's samples for the planner, as ``costs(step, samples)``.

    All steps in time of a video count as equally large. For InternVL, whose frames are images, this is approximate: the
    video counts as one image, but the forward pass rounds the number of kept tokens of each frame."""

    index: SampleIndex
    cost: TrainingCost
    phases: Phases

    def __call__(self, step: int, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[samples] tokens before dropping, and [samples] FLOPs of the forward and backward passes of the step."""
        measured, num_layers = self.index.lengths(samples), self.cost.decoder.num_layers
        phase = self.phases.of(step)
        drops = phase.drops(num_layers)
        spans = measured.span_tokens, measured.span_sample
        lengths = stage_lengths(measured.text, *spans, drops, measured.span_frames, phase.per)
        layers = layers_per_stage(drops, num_layers)
        costs = self.cost.sample(
            lengths,
            layers,
            measured.span_tiles,
            measured.supervised,
            measured.span_sample,
            measured.span_frames,
            phase.method,
        )
        if phase.teacher is not None:
            drops, per = phase.teacher.drops(num_layers), phase.teacher.per
            taught = stage_lengths(measured.text, *spans, drops, measured.span_frames, per)
            costs = costs + self.cost.forward_text(taught, layers_per_stage(drops, num_layers), measured.supervised)
            methods = phase.teacher.method, phase.method
            seen = self.cost.teacher_vision(measured.span_tiles, measured.span_frames, *methods)
            costs = costs + np.bincount(measured.span_sample, weights=seen, minlength=len(costs))
        return lengths[:, 0], costs


def data_digest(sample_ids: Sequence[str]) -> str:
    """A hash of a step's sample ids in their order."""
    return hashlib.sha256("\n".join(sample_ids).encode()).hexdigest()[:16]
