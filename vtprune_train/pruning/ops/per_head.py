"""Selection of the keys that each head keeps: pure functions on a layer's queries and keys, without device-to-host
copies.

Each image is scored by the first query row after it, as during prefill.

Shape suffixes: T tokens of the stream, V visual tokens, Q query rows, L tokens of one segment, S spans, H query heads,
G key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vtprune_train.core.stream import Boundary
from vtprune_train.pruning.candidates import Ranking
from vtprune_train.pruning.ops.scoring import segment_attention


def judged_attention(ranking: Ranking, boundary: Boundary) -> Iterator[tuple[Tensor, Tensor]]:
    """Causal attention of the query rows of each segment with images, and which query row scores each token.

    Yields:
        [G, Q, L] float32 attention of the segment's query rows, averaged over the query heads of each key-value head;
        [L] int64, for each token the index of the first query row at or after it (or of the last row if there is none;
        its attention to the token is then 0).
    """
    attention_HQL = segment_attention(ranking, boundary)
    for segment, attention in zip(boundary.segments, attention_HQL, strict=True):
        rows = boundary.query_rows[segment.query_start : segment.query_end] - segment.start
        judge = torch.searchsorted(rows, torch.arange(attention.shape[-1], device=rows.device))
        of_groups = attention.unflatten(0, (ranking.keys.shape[1], -1)).mean(dim=1)
        yield of_groups, judge.clamp(max=len(rows) - 1)


def of_visual(parts: list[Tensor], boundary: Boundary) -> Tensor:
    """Select the visual tokens: values of all tokens of the segments with images, segment by segment -> [..., V]."""
    return torch.cat(parts, dim=-1).index_select(-1, boundary.visual_in_scored)


def span_sizes(span_V: Tensor, num_spans: int) -> Tensor:
    """[S] int64, tokens of each span."""
    return torch.zeros(num_spans, dtype=torch.int64, device=span_V.device).index_add(0, span_V, torch.ones_like(span_V))


def keep_best(scores_GV: Tensor, span_V: Tensor, counts_S: Tensor) -> Tensor:
    """[G, V] bool mask of each head's top ``counts_S`` tokens per span; ties go to the earlier token.

    Args:
        scores_GV: [G, V] float32.
        span_V: [V] int64, the span of each token, ascending.
        counts_S: [S] int64, on the device.
    """
    by_score = torch.sort(scores_GV, dim=1, descending=True, stable=True).indices
    by_span = by_score.gather(1, torch.sort(span_V[by_score], dim=1, stable=True).indices)
    sizes = span_sizes(span_V, len(counts_S))
    rank = torch.arange(len(span_V), device=span_V.device) - (sizes.cumsum(0) - sizes)[span_V]
    best = (rank < counts_S[span_V]).expand(len(scores_GV), -1)
    return torch.zeros_like(best).scatter(1, by_span, best)
