"""What the samples of one step cost, before and after dropping, from the index alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vtprune_train.core.flops import TrainingCost, layers_per_stage, stage_lengths
from vtprune_train.data.index import SampleIndex
from vtprune_train.pruning.phases import Phases


@dataclass(frozen=True)
class StepCosts:
    """Measures the samples of a step for the planner: ``costs(step, samples)``.

    Args:
        index: lengths and pictures of all samples.
        cost: counts FLOPs.
        phases: which schedule a step runs on.
    """

    index: SampleIndex
    cost: TrainingCost
    phases: Phases

    def __call__(self, step: int, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[samples] tokens before dropping, and [samples] FLOPs of the step's own forward and backward passes."""
        own, num_layers = self.index.lengths(samples), self.cost.decoder.num_layers
        phase = self.phases.of(step)
        drops = phase.drops(num_layers)
        lengths = stage_lengths(own.text, own.span_tokens, own.span_sample, drops)
        layers = layers_per_stage(drops, num_layers)
        costs = self.cost.sample(lengths, layers, own.span_tiles, own.supervised, own.span_sample)
        if phase.teacher is not None:
            drops = phase.teacher.method.drops(num_layers)
            taught = stage_lengths(own.text, own.span_tokens, own.span_sample, drops)
            costs = costs + self.cost.forward_text(taught, layers_per_stage(drops, num_layers), own.supervised)
        return lengths[:, 0], costs
