"""Visual-token scoring: pure functions on a layer's queries and keys.

Shape suffixes: T tokens in the stream, V visual tokens, Q query rows, L tokens of one segment, H query heads,
G key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from vtprune_train.core.stream import Boundary, ScoredSegment, SpanLayout
from vtprune_train.pruning.candidates import Ranking


def mean_query_attention(ranking: Ranking | None, boundary: Boundary) -> Tensor:
    """Attention each visual token receives from its segment's query rows, averaged over heads and then rows.

    The softmax (float32) runs over the whole causal row, text and visual keys alike, but is computed for the query
    rows only: O(Q L) instead of O(L^2). Source: PyramidDrop (arXiv 2410.17247), the published code's ranking.

    Args:
        ranking: queries of ``boundary.query_rows`` and keys of all tokens, any float dtype; H must be a multiple of G
            (grouped-query attention).
        boundary: provides segments and visual rows.

    Returns:
        [V] float32, in the order of ``boundary.visual_rows``. A query row contributes nothing to tokens after it
        (causal).
    """
    scores = [attention.mean(dim=(0, 1)) for attention in segment_attention(ranking, boundary)]
    empty = torch.zeros(0, device=boundary.visual_in_scored.device)  # if no segment has an image
    return torch.cat([empty, *scores]).index_select(0, boundary.visual_in_scored)


def _by_group(ranking: Ranking | None) -> tuple[int, Tensor, Tensor]:
    """Query heads; scaled queries [G, H / G, Q, D]; keys [G, D, T]."""
    assert ranking is not None, "candidates.ranking is None: the method must return Needs(rank_with=...) from needs"
    queries_QHD, keys_TGD = ranking.queries, ranking.keys
    scaled = (queries_QHD * ranking.scaling).unflatten(1, (keys_TGD.shape[1], -1)).permute(1, 2, 0, 3)
    return queries_QHD.shape[1], scaled, keys_TGD.permute(1, 2, 0)


def segment_attention(ranking: Ranking | None, boundary: Boundary) -> Iterator[Tensor]:
    """Yield, for each scored segment, the causal attention [H, q, L] float32 of its q query rows.

    Arguments as in :func:`mean_query_attention`.
    """
    num_heads, scaled, keys_GDT = _by_group(ranking)
    stream_rows = torch.arange(keys_GDT.shape[2], device=keys_GDT.device)
    for segment in boundary.segments:
        queries, rows = slice(segment.query_start, segment.query_end), slice(segment.start, segment.end)
        logits = torch.matmul(scaled[:, :, queries].flatten(1, 2), keys_GDT[:, :, rows])  # [G, H / G * q, L]
        future = stream_rows[rows] > boundary.query_rows[queries, None]
        logits = logits.view(num_heads, -1, logits.shape[-1]).masked_fill(future, float("-inf"))
        yield logits.softmax(dim=-1, dtype=torch.float32)


def visual_attention(ranking: Ranking | None, boundary: Boundary) -> Iterator[Tensor]:
    """Yield, for each scored segment, the attention [H, q, v] float32 of its q query rows to its v visual tokens. The
    softmax is over the whole row. Arguments as in :func:`mean_query_attention`.
    """
    columns = boundary.visual_in_scored.split(visual_per_segment(boundary))
    first = 0  # offset of the segment within the concatenated scored segments
    attention_HQL = segment_attention(ranking, boundary)
    for segment, visual, attention in zip(boundary.segments, columns, attention_HQL, strict=True):
        yield attention.index_select(2, visual - first)
        first += segment.end - segment.start


def visual_per_segment(boundary: Boundary) -> list[int]:
    """Number of visual tokens in each scored segment before the drop."""
    by_segment = groupby(boundary.spans, lambda span: span.segment)
    return [sum(span.before for span in spans) for _, spans in by_segment]


def tokens_holding(scores_V: Tensor, share: float) -> Tensor:
    """Scalar int64: smallest number of top tokens whose attention sums to ``share`` of the total; at least 1 if there
    are any tokens."""
    mass = torch.sort(scores_V.double(), descending=True).values.cumsum(0)
    return (mass < share * mass[-1:]).sum().add(1).clamp(max=len(scores_V))


def images_at(boundary: Boundary) -> Iterator[tuple[SpanLayout, ScoredSegment, slice, Tensor]]:
    """Yield, for each image, its span, its segment, its candidates, and [n] int64, the rows of their keys."""
    segments, scored_start, start = iter(boundary.segments), 0, 0
    segment, previous = None, None
    for span in boundary.spans:
        if span.segment != previous:
            scored_start += 0 if segment is None else segment.end - segment.start
            segment, previous = next(segments), span.segment
        assert segment is not None
        visual = slice(start, start + span.before)
        yield span, segment, visual, boundary.visual_in_scored[visual] - scored_start + segment.start
        start += span.before


def visual_query_attention(ranking: Ranking | None, boundary: Boundary) -> Tensor:
    """Attention that each visual token receives from its segment's query rows when they attend to its image alone,
    averaged over heads, then rows.

    Unlike :func:`mean_query_attention`, every head has equal weight, no matter how much it attends to text. Source:
    FEATHER (arXiv 2412.13180), the published code's ranking, whose softmax (float32) runs over the image's keys only.

    Arguments and return value as in :func:`mean_query_attention`; query rows before an image do not contribute.
    """
    num_heads, scaled, keys_GDT = _by_group(ranking)
    scores = [torch.zeros(0, device=keys_GDT.device)]
    for span, segment, _, rows in images_at(boundary):
        queries = slice(segment.query_start, segment.query_end)
        keys_GDn = keys_GDT.index_select(2, rows)
        logits = torch.matmul(scaled[:, :, queries].flatten(1, 2), keys_GDn)  # [G, H / G * q, n], of which n may be 0
        logits = logits.view(num_heads, segment.query_end - segment.query_start, span.before)
        seen = rows[None, :] <= boundary.query_rows[queries, None]  # the row sees the whole image or none of it
        weights = logits.softmax(dim=-1, dtype=torch.float32).masked_fill(~seen, 0.0)
        scores.append(weights.mean(dim=(0, 1)))
    return torch.cat(scores)
