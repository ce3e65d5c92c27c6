"""How far a method's answers are from those of the dense model, and from the true ones, on questions about images.

Shape suffixes: B rows, L tokens of a prompt and its answer, N answer tokens of a batch, W words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtprune_train.core.stream import IGNORE
from vtprune_train.evaluation.answering import GREEDY, Loaded, Prompt, batch, padding
from vtprune_train.evaluation.questions import normalized
from vtprune_train.evaluation.timing import measured_answers
from vtprune_train.models.patch import backend_for, prune, unprune
from vtprune_train.pruning.base import PruningMethod


@dataclass(frozen=True)
class Closeness:
    """``kl``: mean over the dense answers' tokens of KL(dense || pruned), in nats; ``match``: the share of answers at
    whose every token both models find the same word likeliest, so that greedy decoding gives the same."""

    kl: float
    match: float


@dataclass(frozen=True)
class Answered:
    """One batch with the dense model's answers after its prompts.

    Args:
        inputs: what the model takes, ``labels`` [B, L] at the answers' tokens among it.
        dense: [N, W] float32, the dense model's log-probabilities at the rows that predict these tokens.
        rows: [N] int64, whose answer each is.
    """

    inputs: dict[str, Any]
    dense: Tensor
    rows: Tensor


@contextmanager
def pruned_by(loaded: Loaded, method: PruningMethod | None, attention: str) -> Iterator[None]:
    """The model with ``method``; for ``None`` packed without dropping. Afterwards it is as it was."""
    prune(loaded.model, method, attention=attention)
    try:
        yield
    finally:
        unprune(loaded.model)


@dataclass(frozen=True)
class Calibration:
    """Questions that a method is measured on.

    Args:
        loaded: the model, dense.
        batches: what it answered.
        text: [samples] tokens of each prompt and answer that are no visual tokens.
        visual: [samples] visual tokens of each.
        attention: the backend, chosen once.
    """

    loaded: Loaded
    batches: tuple[Answered, ...]
    text: np.ndarray
    visual: np.ndarray
    attention: str

    def closeness(self, method: PruningMethod | None) -> Closeness:
        """Of the model with ``method`` to the dense one.

        Raises:
            ValueError: the method does not fit the model.
        """
        if method is None:
            return Closeness(0.0, 1.0)
        kl, matched, tokens, answers = 0.0, 0, 0, 0
        with pruned_by(self.loaded, method, self.attention):
            for done in self.batches:
                ours = _log_probabilities(self.loaded, done.inputs)
                kl += float((done.dense.exp() * (done.dense - ours)).sum())
                wrong = ours.argmax(dim=-1) != done.dense.argmax(dim=-1)
                asked = len(done.rows.unique())
                matched += asked - len(done.rows[wrong].unique())
                tokens, answers = tokens + len(ours), answers + asked
        return Closeness(max(kl, 0.0) / tokens, matched / answers)


def calibrate(loaded: Loaded, prompts: Sequence[Prompt], max_new_tokens: int, batch_size: int) -> Calibration:
    """Let the dense model answer greedily.

    Args:
        loaded: not pruned.
        prompts: with images.
        max_new_tokens: at most, of each answer.
        batch_size: prompts answered, and later measured, at once.
    """
    batches = []
    for start in range(0, len(prompts), batch_size):
        inputs = batch(loaded, prompts[start : start + batch_size])
        batches.append(_answered(loaded, dict(inputs), max_new_tokens))
    image_token = loaded.model.config.image_token_id
    ids, masks = zip(*((done.inputs["input_ids"], done.inputs["attention_mask"]) for done in batches), strict=True)
    visual = torch.cat([(own == image_token).sum(dim=1) for own in ids]).cpu().numpy()
    length = torch.cat([own.sum(dim=1) for own in masks]).cpu().numpy()
    return Calibration(loaded, tuple(batches), length - visual, visual, backend_for(loaded.model))


@torch.inference_mode()
def _answered(loaded: Loaded, inputs: dict[str, Any], max_new_tokens: int) -> Answered:
    prompts = inputs["input_ids"]
    sequences = loaded.model.generate(**inputs, **GREEDY, **padding(loaded), max_new_tokens=max_new_tokens)
    labels = torch.full_like(sequences, IGNORE)
    known = loaded.model.generation_config.eos_token_id
    ends = set(known if isinstance(known, list) else [known])
    for row, answer in enumerate(sequences[:, prompts.shape[1] :]):
        end = next((place for place, token in enumerate(answer.tolist()) if token in ends), len(answer))
        length = min(end + 1, len(answer))  # the token that ends the answer included
        labels[row, prompts.shape[1] : prompts.shape[1] + length] = answer[:length]
    # After an answer's end the padding counts as text: causal attention keeps it from the answer's rows.
    extended = {
        key: torch.cat([value, value.new_full((len(value), sequences.shape[1] - value.shape[1]), filler)], dim=1)
        for key, value in inputs.items()
        if isinstance(value, Tensor) and value.shape == prompts.shape
        for filler in [1 if key == "attention_mask" else 0]
    }
    extended = {**inputs, **extended, "input_ids": sequences, "labels": labels}
    rows = (labels[:, 1:] != IGNORE).nonzero()[:, 0]
    return Answered(extended, _log_probabilities(loaded, extended), rows)


@torch.inference_mode()
def _log_probabilities(loaded: Loaded, inputs: dict[str, Any]) -> Tensor:
    """[N, W] float32 at the rows before supervised tokens."""
    logits = loaded.model(**inputs, use_cache=False).logits
    return logits[:, :-1][inputs["labels"][:, 1:] != IGNORE].float().log_softmax(dim=-1)


def prompts_with_images(questions: Sequence[Any], opened: Any) -> Iterator[Prompt]:
    """The questions that show an image; ``opened`` opens one.

    Raises:
        ValueError: an image cannot be read.
    """
    for question in questions:
        if question.images:
            yield [opened(path) for path in question.images], question.turns


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
        exact_match=mean([a == b for a, b in zip(said, map(normalized, references), strict=True)]),
        agreement=1.0 if dense is None else mean([a == b for a, b in zip(said, dense, strict=True)]),
        kl=calibration.closeness(method).kl,
        visual_tokens=mean([one.visual_tokens[0] for one in measured]),
        entering=mean([one.entering for one in measured]),
        leaving=mean([one.leaving for one in measured]),
        cached=mean([one.cached for one in measured]),
        prefill_flops=mean(flops) if flops else None,
        answers=said,
    )
