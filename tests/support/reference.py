"""A slow, obvious PyramidDrop: one sample at a time, plain lists and loops, full masked attention, no packing.

Written from the description of the method, independently of the fast code; used only to compare with it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """x [H, L, D] rotated to ``positions`` [L], half-split layout; [L, D / 2] if each frequency has its own."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = (positions[:, None] if positions.ndim == 1 else positions) * frequencies[None, :]
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def queries_and_keys(layer, x: Tensor, positions: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """[H, L, D] each; grouped keys are repeated to the query heads."""
    attention = layer.self_attn
    normed = layer.input_layernorm(x)
    q = split_queries(attention, normed)[0].transpose(0, 1)
    k = attention.k_proj(normed).view(len(x), -1, attention.head_dim).transpose(0, 1)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    k = torch.stack([k[head // (q.shape[0] // k.shape[0])] for head in range(q.shape[0])])
    rotated = int(attention.head_dim * attention.config.rope_parameters.get("partial_rotary_factor", 1.0))
    q, k = (torch.cat([rotate(one[..., :rotated], positions, theta), one[..., rotated:]], dim=-1) for one in (q, k))
    return q, k


def split_queries(attention, normed: Tensor) -> tuple[Tensor, Tensor | None]:
    """[L, H, D] queries, and the gate of the output of each head (Qwen3.5), which comes from the same projection."""
    width = attention.q_proj.out_features // (attention.o_proj.in_features // attention.head_dim)
    q = attention.q_proj(normed).view(len(normed), -1, width)
    return q[..., : attention.head_dim], q[..., attention.head_dim :] if width > attention.head_dim else None


def attention_rows(q: Tensor, k: Tensor) -> Tensor:
    """[H, L, L] causal softmax."""
    length = q.shape[1]
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)


def run_layer(layer, x: Tensor, positions: Tensor, theta: float) -> Tensor:
    if not hasattr(layer, "self_attn"):  # linear attention, which has no positions
        x = x + layer.linear_attn(layer.input_layernorm(x).unsqueeze(0)).squeeze(0)
        return x + layer.mlp(layer.post_attention_layernorm(x))
    attention = layer.self_attn
    q, k = queries_and_keys(layer, x, positions, theta)
    v = attention.v_proj(layer.input_layernorm(x)).view(len(x), -1, attention.head_dim).transpose(0, 1)
    v = torch.stack([v[head // (q.shape[0] // v.shape[0])] for head in range(q.shape[0])])
    mixed = (attention_rows(q, k) @ v).transpose(0, 1).reshape(len(x), -1)
    gate = split_queries(attention, layer.input_layernorm(x))[1]
    if gate is not None:
        mixed = mixed * gate.reshape(len(x), -1).sigmoid()
    x = x + attention.o_proj(mixed)
    return x + layer.mlp(layer.post_attention_layernorm(x))


def pyramiddrop(
    text_model,
    embeds: Tensor,
    spans: Sequence[Collection[int]],
    query_offsets: list[int],
    layers: list[int],
    keep: list[float],
    rank_with: str = "next_layer",
    positions: str = "renumber",
    start: Tensor | None = None,
    deepstack: Sequence[Tensor] = (),
) -> tuple[Tensor, list[int]]:
    """One sample through all layers. Returns hidden states before the final norm, and the original offsets kept.

    ``spans`` are the offsets of each image's or video's tokens; ``start`` are positions other than the offsets, for
    ``rotate``; ``deepstack`` [L, C] are features, 0 for text, that are added after layer 0, 1, ..."""
    theta = text_model.config.rope_parameters["rope_theta"]
    alive = list(range(len(embeds)))
    position = torch.arange(len(embeds)) if start is None else start
    x = before_last = embeds
    for index, layer in enumerate(text_model.layers):
        if index in layers:
            ratio = keep[layers.index(index)]
            ranking_layer = layer if rank_with == "next_layer" else text_model.layers[index - 1]
            source = x if rank_with == "next_layer" else before_last
            with torch.no_grad():
                weights = attention_rows(*queries_and_keys(ranking_layer, source, position, theta)).mean(dim=0)
            kept = [offset for offset in alive if not any(offset in span for span in spans)]
            for span in spans:
                present = [offset for offset in alive if offset in span]
                rows = []
                for query in query_offsets:
                    if any(query in other for other in spans):
                        query = max(o for o in alive if o <= query)  # an image's last remaining token
                    rows.append(alive.index(query))
                worth = {o: sum(weights[row, alive.index(o)].item() for row in rows) / len(rows) for o in present}
                best = sorted(present, key=lambda o: (-worth[o], o))[: math.floor(len(span) * ratio)]
                kept += best
            kept.sort()
            places = [alive.index(offset) for offset in kept]
            x = x[places]
            position = torch.arange(len(kept)) if positions == "renumber" else position[places]
            alive = kept
        before_last = x
        x = run_layer(layer, x, position, theta)
        if index < len(deepstack):
            x = x + deepstack[index][alive]
    return x, alive
