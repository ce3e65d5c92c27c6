"""What a method's answers are worth: beside the dense model's, and beside the true ones."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from vtprune_train.bench.calibration import Calibration, pruned_by
from vtprune_train.evaluation.questions import normalized
from vtprune_train.evaluation.timing import measured_answers
from vtprune_train.pruning import PruningMethod


@dataclass(frozen=True)
class Quality:
    """One method on all questions.

    Args:
        exact_match: share of answers that are the true ones.
        agreement: share of answers that are the dense model's (greedy both).
        kl: mean over the tokens of the dense model's answers of KL(dense || pruned), teacher-forced, in nats.
        visual_tokens: mean over questions, before dropping.
        entering, leaving, cached: likewise, as counted; see :class:`~vtprune_train.core.flops.VisualTokens`.
        prefill_flops: mean over questions; ``None`` where the decoder is not counted.
        answers: normalised, in the questions' order.
    """

    exact_match: float
    agreement: float
    kl: float
    visual_tokens: float
    entering: float
    leaving: float
    cached: float
    prefill_flops: float | None
    answers: tuple[str, ...]


def quality(
    calibration: Calibration,
    batches: Sequence[Any],
    references: Sequence[str],
    method: PruningMethod | None,
    dense: Sequence[str] | None,
    max_new_tokens: int,
) -> Quality:
    """Ask everything.

    Args:
        calibration: the dense model's answers to the same questions, for the divergence.
        batches: ``generate``'s inputs.
        references: true answers, in the batches' order.
        method: ``None`` for the dense model itself.
        dense: its answers; ``None`` where this makes them.
        max_new_tokens: at most, of an answer.

    Raises:
        ValueError: the method does not fit the model.
    """
    loaded = calibration.loaded
    with nullcontext() if method is None else pruned_by(loaded, method, calibration.attention):
        measured = [one for inputs in batches for one in measured_answers(loaded, inputs, max_new_tokens)]
    said = tuple(normalized(one.answer) for one in measured)

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    flops = [one.prefill_flops for one in measured if one.prefill_flops is not None]
    return Quality(
        exact_match=_equal(said, [normalized(reference) for reference in references]),
        agreement=_equal(said, said if dense is None else dense),
        kl=calibration.closeness(method).kl,
        visual_tokens=mean([one.visual_tokens[0] for one in measured]),
        entering=mean([one.entering for one in measured]),
        leaving=mean([one.leaving for one in measured]),
        cached=mean([one.cached for one in measured]),
        prefill_flops=mean(flops) if flops else None,
        answers=said,
    )


def _equal(one: Sequence[str], other: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)
