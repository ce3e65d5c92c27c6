"""What the samples of one step cost, before and after dropping, from the index alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vtprune_train.data.index import SampleIndex
from vtprune_train.flops import TrainingCost, layers_per_stage, stage_lengths
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
        index, num_layers = self.index, self.cost.decoder.num_layers
        spans, sample_of_span = spans_of(index, samples)
        text, visual = index.text[samples], index.span_tokens[spans]
        phase = self.phases.of(step)
        drops = phase.drops(num_layers)
        lengths = stage_lengths(text, visual, sample_of_span, drops)
        supervised = index.supervised[samples]
        costs = self.cost.sample(
            lengths, layers_per_stage(drops, num_layers), index.span_tiles[spans], supervised, sample_of_span
        )
        if phase.teacher is not None:
            drops = phase.teacher.method.drops(num_layers)
            taught = stage_lengths(text, visual, sample_of_span, drops)
            costs = costs + self.cost.forward_text(taught, layers_per_stage(drops, num_layers), supervised)
        return lengths[:, 0], costs


def spans_of(index: SampleIndex, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The images of ``samples``, as positions in the index's image arrays, and which of ``samples`` each belongs to."""
    first = np.searchsorted(index.span_sample, samples, side="left")
    counts = np.searchsorted(index.span_sample, samples, side="right") - first
    owner = np.repeat(np.arange(len(samples)), counts)
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - first, counts), owner
