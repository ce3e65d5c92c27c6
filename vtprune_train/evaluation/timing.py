"""Generates one batch of greedy answers and measures it: time of prefill and decoding, tokens of every stage, cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from vtprune_train.core.flops import (
    DecoderGeometry,
    VisualTokens,
    hidden_text,
    selector_flops,
    stage_layers,
    visual_per_stage,
)
from vtprune_train.core.stream import StreamPlan
from vtprune_train.evaluation.answering import GREEDY, Loaded, decoded, padding
from vtprune_train.models import HFModule
from vtprune_train.models.cache import StagedLayer, cache_bytes
from vtprune_train.models.forward.calls import STATE, state_of
from vtprune_train.models.patch import is_pruned, method_of


@dataclass(frozen=True)
class Measured:
    """Measurements of one row of a batch. Times are the batch's, divided equally among its rows.

    Args:
        answer: without special tokens and surrounding spaces.
        visual_tokens: number before dropping, then in every later stage, as executed.
        entering, leaving, cached: means over the layers, as executed; see
            :class:`~vtprune_train.core.flops.VisualTokens`.
        prompt_tokens: text and visual tokens before dropping.
        prefill_seconds: from the start of ``generate`` to the first token's logits, including the vision tower.
        decode_seconds: time of all later steps; ``decode_steps`` is their number.
        cache_bytes: keys and values after the prefill, including padding.
        prefill_flops: FLOPs of the decoder, the selector and one row of the head; ``None`` if the decoder cannot be
            counted.
    """

    answer: str
    visual_tokens: list[int]
    entering: float
    leaving: float
    cached: float
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    decode_steps: int
    cache_bytes: float
    prefill_flops: float | None


class _AtFirstToken(LogitsProcessor):
    """Called by ``generate`` at every step. At the first step the prefill is finished and the cache contains only
    it."""

    def __init__(self, cache: DynamicCache, device: torch.device):
        self.cache, self.device = cache, device
        self.prefill_end: float | None = None
        self.decode_start = 0.0
        self.cache_bytes = 0
        self.tokens: list[Tensor | None] = []  # [B] per layer; None if the cache is not staged

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.prefill_end is None:
            self.prefill_end = now(self.device)
            self.cache_bytes = cache_bytes(self.cache)
            self.tokens = [
                layer.num_tokens().cpu() if isinstance(layer, StagedLayer) else None for layer in self.cache.layers
            ]
            self.decode_start = now(self.device)
        return scores


def empty_cache(model: HFModule) -> DynamicCache:
    """A cache for ``generate``. That of a dense model with linear attention is created from the config."""
    text = model.config.get_text_config()
    is_linear = "linear_attention" in (getattr(text, "layer_types", None) or ())
    return DynamicCache(config=text) if is_linear and not is_pruned(model) else DynamicCache()


def is_visual(config: Any, input_ids: Tensor) -> Tensor:
    """Whether each token is one of an image or video, bool like ``input_ids``."""
    of_images: Tensor = input_ids == config.image_token_id
    video_token = getattr(config, "video_token_id", None)
    return of_images if video_token is None else of_images | (input_ids == video_token)


def now(device: torch.device) -> float:
    """The time in seconds, after synchronizing ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def plans_run(model: HFModule) -> Iterator[list[StreamPlan]]:
    """A context that collects, in a list, the plan of every prefill that the pruned model executes, in order. Decoding
    steps and dense models have no plans."""
    plans: list[StreamPlan] = []
    if not is_pruned(model):
        yield plans
        return
    inner = next(module for module in model.modules() if STATE in module.__dict__)
    state = state_of(inner)

    def note(*_: Any) -> None:
        call = state.running.call
        if call is not None and call.plan is not None:
            plans.append(call.plan)

    handle = inner.get_submodule(state.family.decoder).register_forward_hook(note)
    try:
        yield plans
    finally:
        handle.remove()


def measured_answers(loaded: Loaded, inputs: Any, max_new_tokens: int, *, min_new_tokens: int = 0) -> list[Measured]:
    """Answer a batch greedily and measure it, with the model in its current state, pruned or dense.

    Args:
        loaded: the model.
        inputs: result of :func:`vtprune_train.evaluation.answering.batch`.
        max_new_tokens: maximum length of each answer.
        min_new_tokens: minimum length, to time answers of equal length.
    """
    device = loaded.model.device
    cache = empty_cache(loaded.model)
    first = _AtFirstToken(cache, device)
    with torch.inference_mode(), plans_run(loaded.model) as plans:
        start = now(device)
        sequences = loaded.model.generate(
            **inputs,
            **GREEDY,
            **padding(loaded),
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            past_key_values=cache,
            logits_processor=LogitsProcessorList([first]),
        )
        end = now(device)
    assert first.prefill_end is not None
    rows = len(sequences)
    prompts = inputs["attention_mask"].sum(dim=1).tolist()
    before = is_visual(loaded.model.config, inputs["input_ids"]).sum(dim=1).tolist()
    flops = _prefill_flops(loaded, plans[0] if plans else None, prompts)
    measured = []
    for row, answer in enumerate(decoded(loaded, inputs, sequences)):
        stages, visual = _visual_tokens(plans[0] if plans else None, first, row, before[row], prompts[row])
        measured.append(
            Measured(
                answer=answer,
                visual_tokens=stages,
                entering=visual.entering,
                leaving=visual.leaving,
                cached=visual.cached,
                prompt_tokens=prompts[row],
                prefill_seconds=(first.prefill_end - start) / rows,
                decode_seconds=(end - first.decode_start) / rows,
                decode_steps=sequences.shape[1] - inputs["input_ids"].shape[1] - 1,
                cache_bytes=first.cache_bytes / rows,
                prefill_flops=None if flops is None else flops[row],
            )
        )
    return measured


def visual_line(plan: StreamPlan, cache: DynamicCache) -> str:
    """The visual tokens of one prompt's prefill, for a log; ``cache`` contains the prompt and the generated tokens."""
    stages, layers = visual_per_stage(plan), stage_layers(plan)
    visual = VisualTokens.of(stages, layers, [1.0] * sum(layers))
    whole = sum(span.length for segment in plan.outline.segments for span in segment.spans)
    text = cache.get_seq_length() - whole - sum(hidden_text(plan, plan.outline.method))
    cached = [int(layer.num_tokens()[0]) - text for layer in cache.layers if isinstance(layer, StagedLayer)]
    return (
        f"{whole} visual tokens; mean over layers: {visual.entering:.1f} enter a layer, {visual.leaving:.1f} leave "
        f"one, {sum(cached) / len(cached):.1f} stay in the cache"
    )


def _visual_tokens(
    plan: StreamPlan | None, first: _AtFirstToken, row: int, before: int, prompt: int
) -> tuple[list[int], VisualTokens]:
    """The visual tokens of one row in each stage, and their means over layers. No stage drops text."""
    if plan is None:
        return [before], VisualTokens(float(before), float(before), float(before))
    text = prompt - before
    stages = [stage.segment_lengths[row] - text for stage in plan.stages]
    text -= hidden_text(plan, plan.outline.method)[row]
    kept = [int(tokens[row]) - text for tokens in first.tokens if tokens is not None]
    visual = VisualTokens.of(stages, stage_layers(plan), [1.0] * len(first.tokens))
    return stages, VisualTokens(visual.entering, visual.leaving, sum(kept) / len(kept))


def _prefill_flops(loaded: Loaded, plan: StreamPlan | None, prompts: list[int]) -> list[float] | None:
    """[B] FLOPs of the prefill; those of the selector are divided equally among the rows."""
    try:
        decoder = DecoderGeometry.of(loaded.model.config.get_text_config())
    except ValueError:
        return None
    if plan is None:
        layers = decoder.stages(np.array(prompts)[:, None], [decoder.num_layers])
        return (layers.sum(axis=1) + decoder.head(1.0)).tolist()
    lengths = np.array([stage.segment_lengths for stage in plan.stages]).T  # [B, stages]
    selector = selector_flops(decoder, plan, method_of(loaded.model)) / len(prompts)
    layers = decoder.stages(lengths, stage_layers(plan)).sum(axis=1)
    return (layers + decoder.head(1.0) + selector).tolist()


def drop_layers(loaded: Loaded) -> list[int]:
    """The layers before which the model drops visual tokens; empty for a dense model."""
    method = method_of(loaded.model) if is_pruned(loaded.model) else None
    num_layers = loaded.model.config.get_text_config().num_hidden_layers
    return [] if method is None else [drop.layer for drop in method.drops(num_layers)]
