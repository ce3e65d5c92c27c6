"""Cost of a training run: the mean of its steps, which may keep different numbers of tokens or have a teacher, and GPU
hours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np

from vtprune_train.bench.costs import Cost, Sample, Subject, estimate, segment_of, tower_of
from vtprune_train.core.flops import DecoderGeometry, TrainingCost, selector_flops, stage_layers
from vtprune_train.core.plan import plan_pass
from vtprune_train.models.families.base import Lacks
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.phases import Phase, Phases

TILES, FRAMES = attrgetter("tiles"), attrgetter("frames")


@dataclass(frozen=True)
class RunCost:
    """Mean cost of a training step for a batch of a sample, in FLOPs.

    Args:
        step: of the whole model, or of the decoder if ``whole`` is false because the tower cannot be counted.
        whole: see ``step``.
        steps: description of what the steps keep.
        hours: GPU hours of the run, dense and with dropping; ``None`` if not asked for.
    """

    step: Cost
    whole: bool
    steps: str
    hours: Cost | None = None


def run_cost(
    subject: Subject, sample: Sample, phases: Phases, samples: int | None = None, tflops: float | None = None
) -> RunCost:
    """Estimate a run.

    Args:
        subject: the model; its method is replaced by those of the phases.
        sample: an average sample.
        phases: what the steps of the run keep.
        samples: number of samples trained on, all epochs together.
        tflops: achieved TFLOP/s of a GPU. With both, GPU hours are computed.
    """
    result = estimate(subject, sample)
    whole = result.training_whole is not None

    def of(phase: Phase) -> float:
        counted = estimate(replace(subject, method=phase.method), sample)
        cost = counted.training_whole if whole else counted.training_decoder
        assert cost is not None
        if phase.teacher is None:
            return cost.pruned
        return cost.pruned + _forward(subject, phase.teacher.method, phase.method, sample, whole)

    dense = result.training_whole or result.training_decoder
    step = Cost(dense.dense, phases.mean(of))
    hours = None
    if samples is not None and tflops is not None:
        scale = samples / sample.batch / (tflops * 1e12) / 3600
        hours = Cost(step.dense * scale, step.pruned * scale)
    return RunCost(step, whole, phases.describe(), hours)


def _forward(
    subject: Subject, method: PruningMethod | None, trained: PruningMethod | None, sample: Sample, whole: bool
) -> float:
    """FLOPs of a teacher's forward pass for a batch: decoder, head (on the answer) and selector, and if ``whole`` the
    tower, where it runs again because one of the methods changes its tokens."""
    decoder = DecoderGeometry.of(subject.config.get_text_config())
    plan = plan_pass([segment_of(sample, sample.answer)], decoder.num_layers, method)
    adapter = decoder.adapter_per_token(subject.peft.r, subject.peft.target_modules) if subject.peft else 0.0
    tower = tower_of(subject.config)
    cost = TrainingCost(
        decoder,
        None if isinstance(tower, Lacks) else tower,
        trains_decoder=False,
        trains_tower=False,
        trains_projector=False,
        adapter=adapter,
    )
    lengths = np.array([[stage.num_tokens for stage in plan.stages]])
    text = cost.forward_text(lengths, stage_layers(plan), np.array([sample.answer]))
    vision = 0.0
    if whole:
        tiles, frames = (np.array([value(image) for image in sample.images]) for value in (TILES, FRAMES))
        vision = float(cost.teacher_vision(tiles, frames, method, trained).sum())
    return sample.batch * (float(text[0]) + selector_flops(decoder, plan, method) + vision)


def render(cost: RunCost) -> list[str]:
    """Format a run's cost as lines of text."""
    scale = 1e12 if cost.step.dense >= 1e12 else 1e9
    name = f"mean training step, {'whole model' if cost.whole else 'decoder'}"
    unit, step = "TFLOP" if scale == 1e12 else "GFLOP", cost.step
    lines = [
        f"mean over the steps: {cost.steps}",
        f"{name:<35}{step.dense / scale:>12.3f}{step.pruned / scale:>12.3f}{step.ratio:>12.3f}x faster   {unit}",
    ]
    if cost.hours is not None:
        lines.append(
            f"{'GPU hours':<35}{cost.hours.dense:>12.1f}{cost.hours.pruned:>12.1f}{cost.hours.ratio:>12.3f}x faster"
        )
    return lines
