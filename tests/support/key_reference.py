"""A slow, obvious decoder in which each head leaves keys out: one sample, full attention, one mask for each head.

Nothing is packed or cached: every row is computed with every key, and what a later row may not see is masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.support.reference import attention_rows, queries_and_keys
from vtprune_train.core.rounding import as_fraction, floor_of

# (layer, attention rows [H, L, L], keys [H, L, D]) -> for each key-value head, for each span, the offsets kept
Choose = Callable[[int, Tensor, Tensor], list[list[set[int]]]]


def judge(span: tuple[int, int], queries: list[int]) -> int | None:
    """The first query row that follows the image, or is its last token."""
    later = [query for query in queries if query >= span[0] + span[1] - 1]
    return min(later) if later else None


def masked_forward(
    text_model,
    embeds: Tensor,
    spans: list[tuple[int, int]],
    queries: list[int],
    layers,
    hidden_after: str,
    choose: Choose,
) -> Tensor:
    """[L, C] hidden states before the final norm."""
    theta = text_model.config.rope_parameters["rope_theta"]
    length, position = len(embeds), torch.arange(len(embeds))
    x = embeds
    for index, layer in enumerate(text_model.layers):
        attention = layer.self_attn
        q, k = queries_and_keys(layer, x, position, theta)
        heads = q.shape[0]
        v = attention.v_proj(layer.input_layernorm(x)).view(length, -1, attention.head_dim).transpose(0, 1)
        groups = v.shape[0]
        seen = torch.ones(length, length, dtype=torch.bool).tril().repeat(heads, 1, 1)
        if index in layers:
            kept = choose(index, attention_rows(q, k), k)
            for head in range(heads):
                for number, (start, n) in enumerate(spans):
                    last = start + n - 1 if hidden_after == "span" else judge((start, n), queries)
                    for offset in range(start, start + n):
                        if last is not None and offset not in kept[head // (heads // groups)][number]:
                            seen[head, last + 1 :, offset] = False
        weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(~seen, float("-inf")).softmax(dim=-1)
        v = torch.stack([v[head // (heads // groups)] for head in range(heads)])
        x = x + attention.o_proj((weights @ v).transpose(0, 1).reshape(length, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return x


def best(scores: dict[int, float], count: int) -> set[int]:
    """The offsets with the highest scores; equal ones: the earlier."""
    return set(sorted(scores, key=lambda offset: (-scores[offset], offset))[:count])


def plphp(spans, queries, groups, *, keep, delta, alpha, beta) -> Choose:
    """Retention class of the layer for each turn's images, then each head's own best tokens."""

    def choose(layer, rows, keys):
        heads = rows.shape[0]
        per_group = heads // groups
        kept: list[list[set[int]]] = [[] for _ in range(groups)]
        for start, n in spans:
            row = judge((start, n), queries)
            if row is None:
                row = max(queries)
            gamma = 0.0
            for head in range(heads):
                for other, m in spans:
                    if (judge((other, m), queries) or max(queries)) == row:
                        gamma += sum(rows[head, row, offset].item() for offset in range(other, other + m)) / heads
            low, middle, high = (as_fraction(keep) + side * as_fraction(delta) for side in (-1, 0, 1))
            rate = high if gamma >= alpha else low if gamma < beta else middle
            for group in range(groups):
                own = range(group * per_group, (group + 1) * per_group)
                scores = {o: sum(rows[h, row, o].item() for h in own) for o in range(start, start + n)}
                kept[group].append(best(scores, floor_of(rate, n)))
        return kept

    return choose


def zipvl(spans, queries, groups, *, tau, keep) -> Choose:
    """The fewest tokens that hold the mass tau of the judging row's attention; the visual ones among them stay."""

    def choose(layer, rows, keys):
        kept: list[set[int]] = []
        for start, n in spans:
            row = judge((start, n), queries)
            if row is None:
                row = max(queries)
            mass = {offset: rows[:, row, offset].mean().item() for offset in range(rows.shape[-1])}
            holders, held = set(), 0.0
            for offset in sorted(mass, key=lambda o: (-mass[o], o)):
                if held < tau or tau >= 1.0:
                    holders.add(offset)
                held += mass[offset]
            most = best({o: mass[o] for o in range(start, start + n)}, floor_of(keep, n))
            kept.append(holders & most)
        return [kept] * groups

    return choose
