"""Victor, VoCo-LLaMA and VideoLLM-MoD for one sample, by plain loops over tokens, written from the papers; used only to
compare with."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tests.support.helpers import tiny_model
from tests.support.reference import queries_and_keys, run_layer
from vtprune_train import prune
from vtprune_train.core.rounding import floor_of
from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.models.forward.decoder import run_layers

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}  # the norms compute in float32


def theta(text_model):
    return text_model.config.rope_parameters["rope_theta"]


def with_tokens(embeds: Tensor, spans, learned: Tensor) -> tuple[Tensor, list[str]]:
    """The sequence with ``learned`` [m, C] behind each image, and what each token is: text, image or learned."""
    rows, kinds = [], []
    for offset in range(len(embeds)):
        inside = [span for span in spans if span.start <= offset < span.end]
        rows.append(embeds[offset])
        kinds.append("image" if inside else "text")
        if inside and offset == inside[0].end - 1:
            rows += list(learned)
            kinds += ["learned"] * len(learned)
    return torch.stack(rows), kinds


def slow_victor(text_model, embeds: Tensor, spans, registers: Tensor, layers: int) -> Tensor:
    x, kinds = with_tokens(embeds, spans, registers)
    positions = torch.arange(len(x))
    for index, layer in enumerate(text_model.layers):
        if index == layers:
            stay = [place for place, kind in enumerate(kinds) if kind != "image"]
            x, positions = x[stay], positions[stay]
        x = run_layer(layer, x, positions, theta(text_model))
    return x


def slow_voco(text_model, embeds: Tensor, spans, tokens: Tensor, hide: str = "all_before") -> Tensor:
    """All rows, those of the image too, which nothing behind its summary sees; nor does it see what precedes the first
    image, unless only images are hidden."""
    x, kinds = with_tokens(embeds, spans, tokens)
    positions = torch.arange(len(x))
    sees = torch.zeros(len(x), len(x), dtype=torch.bool)
    image = [-1] * len(x)  # which image a token belongs to
    for place, kind in enumerate(kinds):
        if kind != "text":
            begins = kind == "image" and (place == 0 or kinds[place - 1] != "image")
            image[place] = max(image) + 1 if begins else image[place - 1]
    for row in range(len(x)):
        for key in range(row + 1):
            sees[row, key] = kinds[key] != "image" or image[row] == image[key]
    if hide == "all_before" and "learned" in kinds:
        summary_end = kinds.index("learned") + len(tokens)
        sees[summary_end:, : kinds.index("image")] = False
    for layer in text_model.layers:
        attention = layer.self_attn
        q, k = queries_and_keys(layer, x, positions, theta(text_model))
        v = attention.v_proj(layer.input_layernorm(x)).view(len(x), -1, attention.head_dim).transpose(0, 1)
        v = torch.stack([v[head // (q.shape[0] // v.shape[0])] for head in range(q.shape[0])])
        weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(~sees, float("-inf")).softmax(dim=-1)
        x = x + attention.o_proj((weights @ v).transpose(0, 1).reshape(len(x), -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return x


def slow_mod(text_model, embeds: Tensor, spans, routers: dict[int, Tensor], keep: float) -> Tensor:
    x, positions = embeds, torch.arange(len(embeds))
    for index, layer in enumerate(text_model.layers):
        if index not in routers:
            x = run_layer(layer, x, positions, theta(text_model))
            continue
        rating = [float(row.detach() @ routers[index].detach()) for row in x]
        goes = [o for o in range(len(x)) if not any(span.start <= o < span.end for span in spans)]
        text = set(goes)
        for span in spans:
            best = sorted(range(span.start, span.end), key=lambda o: (-rating[o], o))
            goes += best[: floor_of(keep, span.length)]
        goes.sort()
        after = run_layer(layer, x[goes], positions[goes], theta(text_model))
        rows = list(x)
        for place, offset in enumerate(goes):
            amount = 1.0 if offset in text else 2 / (1 + torch.exp(-(x[offset] @ routers[index])))
            rows[offset] = x[offset] + amount * (after[place] - x[offset])
        x = torch.stack(rows)
    return x


def random_sample(rng: np.random.Generator, num_images: int) -> SegmentLayout:
    """Images that may touch each other, at the start or not, and text behind them."""
    spans, offset = [], int(rng.integers(0, 3))
    for _ in range(num_images):
        spans.append(ImageSpan(offset, int(rng.integers(1, 12))))
        offset = spans[-1].end + int(rng.integers(0, 3))
    offset += 2
    return SegmentLayout(offset + 2, tuple(spans), (offset - 1,), (offset, offset + 1))


def random_video(rng: np.random.Generator, frames: int) -> SegmentLayout:
    """A video of 6 tokens a frame, and text behind it."""
    spans = (ImageSpan(2, 6 * frames, ((2, 3),) * frames, frames=frames),) if frames else ()
    offset = 2 + 6 * frames + int(rng.integers(1, 4))
    return SegmentLayout(offset + 2, spans, (offset - 1,), (offset, offset + 1))


def compared(method, images: list[int], seed: int, kv_heads: int, slow, sample=random_sample):
    """The packed pass of samples with so many images against ``slow(text_model, module, embeds, segment)`` of each;
    outputs and all gradients. ``sample(rng, images)`` makes a sample."""
    rng = np.random.default_rng(seed)
    model = tiny_model(seed, kv_heads=kv_heads).double().train()  # rounding must not decide who is let in
    prune(model, method)
    text_model = model.model.language_model
    segments = [sample(rng, count) for count in images]
    embeds = torch.from_numpy(rng.standard_normal((sum(s.length for s in segments), 32)))
    embeds.requires_grad_()
    plan = method.plan(segments, len(text_model.layers))
    output = run_layers(text_model, embeds, plan, method)
    parts, start = [], 0
    for segment in segments:
        parts.append(slow(text_model, text_model.pruning, embeds[start : start + segment.length], segment))
        start += segment.length
    expected = torch.cat(parts)
    torch.testing.assert_close(output.last_hidden_state, expected, **TOLERANCE)
    weights = torch.from_numpy(rng.standard_normal(expected.shape))
    parameters = [embeds, *text_model.pruning.parameters(), *text_model.layers.parameters()]
    ours = torch.autograd.grad((output.last_hidden_state * weights).sum(), parameters)
    theirs = torch.autograd.grad((expected * weights).sum(), parameters, allow_unused=True)
    for one, two in zip(ours, theirs, strict=True):
        two = torch.zeros_like(one) if two is None else two
        scale = two.abs().max().clamp(min=1.0)
        torch.testing.assert_close(one / scale, two / scale, **TOLERANCE)
    return ours
