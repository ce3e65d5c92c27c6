"""Measures the time of methods in interleaved repeats, so that drift of the machine affects all of them equally."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtprune_train.bench.calibration import calibrate, pruned_by
from vtprune_train.bench.rivals import DENSE, Rival
from vtprune_train.evaluation.answering import Loaded, Prompt, batch
from vtprune_train.evaluation.timing import measured_answers, now


@dataclass
class Times:
    """Measurements of one method at one batch size; times are the seconds of every repeat, for the whole batch.

    Args:
        prefill: tower, projector and decoder up to the first token's logits.
        decode: one decoding step.
        train: forward and backward of a step, without an optimizer; empty if not measured.
        cache_bytes: keys and values of the batch after the prefill, including padding.
        peak_bytes: peak memory of CUDA's allocator in generation and in training; ``None`` on a CPU.
        no_training: why ``train`` is empty.
    """

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    cache_bytes: float = 0.0
    peak_bytes: list[int] | None = None
    no_training: str | None = None


def clocked(
    loaded: Loaded,
    rivals: Sequence[Rival],
    prompts: Sequence[Prompt],
    *,
    sizes: Sequence[int],
    repeats: int,
    new_tokens: int,
    train: bool,
    attention: str,
) -> dict[int, dict[str, Times]]:
    """Measure methods. A first repeat for warm-up is discarded.

    Args:
        loaded: the model, not pruned.
        rivals: the methods; ``DENSE`` packs without dropping, so that ratios to it measure only the effect of dropping.
        prompts: prompts of the batches, repeated if there are too few.
        sizes: batch sizes.
        repeats: number of repeats of every method.
        new_tokens: tokens of each answer, at least 2 to measure a decoding step.
        train: whether to measure training steps.
        attention: the attention backend.

    Returns:
        Times by batch size and by the methods' titles.
    """
    results = {}
    for size in sizes:
        repeated = [prompts[index % len(prompts)] for index in range(size)]
        inputs, training_inputs = batch(loaded, repeated), None
        if train:  # clones, because autograd cannot use tensors that were created in inference mode
            answered = calibrate(loaded, repeated, new_tokens, size).batches[0].inputs
            training_inputs = {
                k: value.clone() if isinstance(value, Tensor) else value for k, value in answered.items()
            }
        times = {rival.title: Times() for rival in rivals}
        for repeat in range(repeats + 1):
            first = repeat % len(rivals)
            for rival in [*rivals[first:], *rivals[:first]]:
                with pruned_by(loaded, rival.method, attention):
                    _repeat(loaded, times[rival.title], inputs, training_inputs, new_tokens, keep=repeat > 0)
        results[size] = times
    return results


def _repeat(
    loaded: Loaded, times: Times, inputs: Any, training_inputs: Mapping[str, Any] | None, new_tokens: int, keep: bool
) -> None:
    """Run one repeat of one method; record it if ``keep``."""
    cuda = loaded.model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(loaded.model.device)
    rows = measured_answers(loaded, inputs, new_tokens, min_new_tokens=new_tokens)
    peak = [torch.cuda.max_memory_allocated(loaded.model.device)] if cuda else []
    seconds = None
    if training_inputs is not None and times.no_training is None:
        if cuda:
            torch.cuda.reset_peak_memory_stats(loaded.model.device)
        try:
            seconds = _train_step(loaded, training_inputs)
        except ValueError as error:
            times.no_training = str(error)
        peak += [torch.cuda.max_memory_allocated(loaded.model.device)] if cuda else []
    if not keep:
        return
    times.prefill.append(sum(row.prefill_seconds for row in rows))
    times.decode.append(sum(row.decode_seconds for row in rows) / rows[0].decode_steps)
    times.cache_bytes = sum(row.cache_bytes for row in rows)
    times.peak_bytes = [max(pair) for pair in zip(peak, times.peak_bytes or peak, strict=True)] if cuda else None
    if seconds is not None:
        times.train.append(seconds)


def _train_step(loaded: Loaded, inputs: Mapping[str, Any]) -> float:
    """Seconds of forward and backward with gradients of all parameters."""
    model = loaded.model
    model.train()
    try:
        start = now(model.device)
        model(**inputs, use_cache=False).loss.backward()
        return now(model.device) - start
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()


def summarized(times: dict[str, Times]) -> dict[str, dict[str, Any]]:
    """Medians, and medians over repeats of the ratio to the dense time of the same repeat."""

    def row(seconds: list[float], dense: list[float]) -> dict[str, Any] | None:
        if not seconds:
            return None
        ratio = statistics.median(one / whole for one, whole in zip(seconds, dense, strict=True))
        return {"seconds": statistics.median(seconds), "ratio": ratio, "spread": [min(seconds), max(seconds)]}

    dense = times[DENSE]
    return {
        title: {
            **{key: row(getattr(rival, key), getattr(dense, key)) for key in ("prefill", "decode", "train")},
            "cache_bytes": rival.cache_bytes,
            "cache_ratio": rival.cache_bytes / dense.cache_bytes,
            "peak_bytes": rival.peak_bytes,
            "no_training": rival.no_training,
        }
        for title, rival in times.items()
    }
