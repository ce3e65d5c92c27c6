"""One batch of greedy answers with its measurements: prefill apart from decoding, tokens of every stage, cache."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from vtprune_train.inference.chatting import GREEDY, Loaded, decoded, padding
from vtprune_train.models.cache import StagedLayer, cache_bytes
from vtprune_train.models.patch import is_pruned, method_of


@dataclass(frozen=True)
class Measured:
    """One row of a batch. Times are the batch's, shared equally among its rows.

    Args:
        answer: without special tokens and outer space.
        visual_tokens: before dropping, then of every later stage, counted in the cache.
        prompt_tokens: text and visual tokens before dropping.
        prefill_seconds: from ``generate``'s start to the first token's logits, vision tower included.
        decode_seconds: of all later steps; ``decode_steps`` counts them.
        cache_bytes: keys and values behind the prefill, padding columns included.
    """

    answer: str
    visual_tokens: list[int]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    decode_steps: int
    cache_bytes: float


class _AtFirstToken(LogitsProcessor):
    """Called by ``generate`` at every step; at the first one the prefill is over and the cache holds just that."""

    def __init__(self, cache: DynamicCache, device: torch.device):
        self.cache, self.device = cache, device
        self.arrived: float | None = None
        self.went_on = 0.0
        self.cache_bytes = 0
        self.tokens: list[Tensor | None] = []  # [B] of each layer; None where the cache is not staged

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.arrived is None:
            self.arrived = now(self.device)
            self.cache_bytes = cache_bytes(self.cache)
            self.tokens = [
                layer.num_tokens().cpu() if isinstance(layer, StagedLayer) else None for layer in self.cache.layers
            ]
            self.went_on = now(self.device)
        return scores


def now(device: torch.device) -> float:
    """Seconds, when everything submitted to ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measured_answers(loaded: Loaded, inputs: Any, max_new_tokens: int) -> list[Measured]:
    """Answer a batch of :func:`vtprune_train.inference.chatting.batch` greedily, pruned or dense as the model is now.

    Args:
        loaded: the model.
        inputs: [B, L] and pixels.
        max_new_tokens: at most, of each answer.
    """
    device = loaded.model.device
    cache = DynamicCache()
    first = _AtFirstToken(cache, device)
    with torch.inference_mode():
        start = now(device)
        sequences = loaded.model.generate(
            **inputs,
            **GREEDY,
            **padding(loaded),
            max_new_tokens=max_new_tokens,
            past_key_values=cache,
            logits_processor=LogitsProcessorList([first]),
        )
        end = now(device)
    assert first.arrived is not None
    rows = len(sequences)
    prompts = inputs["attention_mask"].sum(dim=1).tolist()
    visual = _visual_tokens(loaded, inputs, first)
    return [
        Measured(
            answer=answer,
            visual_tokens=visual[row],
            prompt_tokens=prompts[row],
            prefill_seconds=(first.arrived - start) / rows,
            decode_seconds=(end - first.went_on) / rows,
            decode_steps=sequences.shape[1] - inputs["input_ids"].shape[1] - 1,
            cache_bytes=first.cache_bytes / rows,
        )
        for row, answer in enumerate(decoded(loaded, inputs, sequences))
    ]


def _visual_tokens(loaded: Loaded, inputs: Any, first: _AtFirstToken) -> list[list[int]]:
    """[B][stages]: text is never dropped, so what a later stage lacks of the first are visual tokens."""
    before = (inputs["input_ids"] == loaded.model.config.image_token_id).sum(dim=1).cpu()
    stages = [before]
    whole = first.tokens[0]
    for layer in drop_layers(loaded):
        left = first.tokens[layer]
        assert whole is not None and left is not None
        stages.append(before - (whole - left))
    return torch.stack(stages, dim=1).tolist()


def drop_layers(loaded: Loaded) -> list[int]:
    """The layers before which the model drops visual tokens as it is now."""
    method = method_of(loaded.model) if is_pruned(loaded.model) else None
    num_layers = loaded.model.config.get_text_config().num_hidden_layers
    return [] if method is None else [drop.layer for drop in method.drops(num_layers)]
