"""Compares a method's answers with those of the dense model and with the reference answers, on questions about images.

Shape suffixes: B batch size, L tokens of a prompt and its answer, N answer tokens of a batch, W vocabulary size.
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
    """How close a pruned model is to the dense one.

    Args:
        kl: mean KL(dense || pruned) over the tokens of the dense model's answers, in nats.
        match: share of answers for which both models have the same most likely token at every position, so that greedy
            decoding gives the same answer.
    """

    kl: float
    match: float


@dataclass(frozen=True)
class Answered:
    """One batch of prompts with the dense model's answers.

    Args:
        inputs: inputs of the model, including ``labels`` [B, L] for the tokens of the answers.
        dense: [N, W] float32, the dense model's log-probabilities of these tokens.
        rows: [N] int64, the row of the batch that each token belongs to.
    """

    inputs: dict[str, Any]
    dense: Tensor
    rows: Tensor


@contextmanager
def pruned_by(loaded: Loaded, method: PruningMethod | None, attention: str) -> Iterator[None]:
    """A context in which the model is pruned by ``method``; ``None`` packs without dropping."""
    prune(loaded.model, method, attention=attention)
    try:
        yield
    finally:
        unprune(loaded.model)


@dataclass(frozen=True)
class Calibration:
    """Questions with the dense model's answers, on which methods are measured.

    Args:
        loaded: the dense model.
        batches: questions and answers.
        text: [samples] text tokens of each prompt and answer.
        visual: [samples] visual tokens of each sample.
        attention: the attention backend.
    """

    loaded: Loaded
    batches: tuple[Answered, ...]
    text: np.ndarray
    visual: np.ndarray
    attention: str

    def closeness(self, method: PruningMethod | None) -> Closeness:
        """Compare the model pruned by ``method`` with the dense model.

        Raises:
            ValueError: the method does not fit the model.
        """
        if method is None:
            return Closeness(0.0, 1.0)
        kl, matched, tokens, answers = 0.0, 0, 0, 0
        with pruned_by(self.loaded, method, self.attention):
            for answered in self.batches:
                pruned = _log_probabilities(self.loaded, answered.inputs)
                kl += float((answered.dense.exp() * (answered.dense - pruned)).sum())
                differs = pruned.argmax(dim=-1) != answered.dense.argmax(dim=-1)
                num_answers = len(answered.rows.unique())
                matched += num_answers - len(answered.rows[differs].unique())
                tokens, answers = tokens + len(pruned), answers + num_answers
        return Closeness(max(kl, 0.0) / tokens, matched / answers)


def calibrate(loaded: Loaded, prompts: Sequence[Prompt], max_new_tokens: int, batch_size: int) -> Calibration:
    """Generate the dense model's answers greedily.

    Args:
        loaded: the model, not pruned.
        prompts: prompts with images.
        max_new_tokens: maximum length of each answer.
        batch_size: prompts per batch, also in later measurements.
    """
    batches = []
    for start in range(0, len(prompts), batch_size):
        inputs = batch(loaded, prompts[start : start + batch_size])
        batches.append(_answered(loaded, dict(inputs), max_new_tokens))
    image_token = loaded.model.config.image_token_id
    visual = torch.cat([(b.inputs["input_ids"] == image_token).sum(dim=1) for b in batches]).cpu().numpy()
    length = torch.cat([b.inputs["attention_mask"].sum(dim=1) for b in batches]).cpu().numpy()
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
        length = min(end + 1, len(answer))  # with the end-of-sequence token
        labels[row, prompts.shape[1] : prompts.shape[1] + length] = answer[:length]
    # Padding after an answer counts as text; causal attention hides it from the rows of the answer.
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
    """[N, W] float32 log-probabilities that predict the supervised tokens."""
    logits = loaded.model(**inputs, use_cache=False).logits
    return logits[:, :-1][inputs["labels"][:, 1:] != IGNORE].float().log_softmax(dim=-1)


def prompts_with_images(questions: Sequence[Any], load_image: Any) -> Iterator[Prompt]:
    """Prompts of the questions that have images; ``load_image`` loads one.

    Raises:
        ValueError: an image cannot be read.
    """
    for question in questions:
        if question.images:
            yield [load_image(path) for path in question.images], question.turns


@dataclass(frozen=True)
class Quality:
    """Results of one method on all questions.

    Args:
        exact_match: share of answers that equal the reference answers.
        agreement: share of answers that equal the dense model's, both greedy.
        kl: mean KL(dense || pruned) over the tokens of the dense model's answers, teacher-forced, in nats.
        visual_tokens: mean number over questions, before dropping.
        entering, leaving, cached: means over questions, as executed; see
            :class:`~vtprune_train.core.flops.VisualTokens`.
        prefill_flops: mean over questions; ``None`` if the decoder cannot be counted.
        answers: normalized, in the order of the questions.
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
    """Answer all questions with a method.

    Args:
        calibration: the dense model's answers to the same questions, for the KL divergence.
        batches: inputs of ``generate``.
        references: reference answers, in the order of the batches.
        method: the method; ``None`` for the dense model.
        dense: the dense model's answers; ``None`` while computing them.
        max_new_tokens: maximum length of an answer.

    Raises:
        ValueError: the method does not fit the model.
    """
    loaded = calibration.loaded
    with nullcontext() if method is None else pruned_by(loaded, method, calibration.attention):
        measured = [one for inputs in batches for one in measured_answers(loaded, inputs, max_new_tokens)]
    answers = tuple(normalized(one.answer) for one in measured)

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    flops = [one.prefill_flops for one in measured if one.prefill_flops is not None]
    return Quality(
        exact_match=mean([a == b for a, b in zip(answers, map(normalized, references), strict=True)]),
        agreement=1.0 if dense is None else mean([a == b for a, b in zip(answers, dense, strict=True)]),
        kl=calibration.closeness(method).kl,
        visual_tokens=mean([one.visual_tokens[0] for one in measured]),
        entering=mean([one.entering for one in measured]),
        leaving=mean([one.leaving for one in measured]),
        cached=mean([one.cached for one in measured]),
        prefill_flops=mean(flops) if flops else None,
        answers=answers,
    )
