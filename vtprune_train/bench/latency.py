"""Wall-clock of methods side by side: one repeat of every rival, then the next, so that what drifts meets them all."""

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
    """One rival at one batch size: seconds of every repeat, of the whole batch.

    Args:
        prefill: tower, projector and decoder up to the first token's logits.
        decode: of one step.
        train: forward and backward of a step, without an optimizer; empty where it was not measured.
        cache_bytes: keys and values of the batch after the prefill, padding included.
        peak_bytes: most memory that CUDA's allocator held, in generation and in training; ``None`` on a CPU.
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
    """Times by batch size and by the rivals' titles; a first repeat warms up and is thrown away.

    Args:
        loaded: not pruned.
        rivals: ``DENSE`` runs packed without dropping, so that ratios to it are those of dropping alone.
        prompts: the first of them fill the batches, over again where there are too few.
        sizes: of the batches.
        repeats: of every rival.
        new_tokens: that each answer has, at least 2 to time a step of decoding.
        train: whether to time training steps.
        attention: the backend.
    """
    results = {}
    for size in sizes:
        repeated = [prompts[index % len(prompts)] for index in range(size)]
        asked, taught = batch(loaded, repeated), None
        if train:  # copies that autograd takes: these were made in inference mode
            inputs = calibrate(loaded, repeated, new_tokens, size).batches[0].inputs
            taught = {key: value.clone() if isinstance(value, Tensor) else value for key, value in inputs.items()}
        times = {rival.title: Times() for rival in rivals}
        for repeat in range(repeats + 1):
            first = repeat % len(rivals)
            for rival in [*rivals[first:], *rivals[:first]]:
                with pruned_by(loaded, rival.method, attention):
                    _repeat(loaded, times[rival.title], asked, taught, new_tokens, keep=repeat > 0)
        results[size] = times
    return results


def _repeat(
    loaded: Loaded, times: Times, asked: Any, taught: Mapping[str, Any] | None, new_tokens: int, keep: bool
) -> None:
    cuda = loaded.model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(loaded.model.device)
    rows = measured_answers(loaded, asked, new_tokens, min_new_tokens=new_tokens)
    peak = [torch.cuda.max_memory_allocated(loaded.model.device)] if cuda else []
    seconds = None
    if taught is not None and times.no_training is None:
        if cuda:
            torch.cuda.reset_peak_memory_stats(loaded.model.device)
        try:
            seconds = _train_step(loaded, taught)
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
    """Seconds of forward and backward of all parameters."""
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
    """Medians, and the median over repeats of the ratio to the dense run of the same repeat."""

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
