"""Rater selection: which text tokens score the visual tokens, and their attention. Pure functions.

Source: SparseVLM (arXiv 2410.04417) and SparseVLM+. Shape suffixes: V visual tokens of a segment, Q its instruction
rows, H query heads, C hidden size, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from vtprune_train.core.rounding import round_of
from vtprune_train.pruning.candidates import Candidates
from vtprune_train.pruning.ops.scoring import visual_attention, visual_per_segment

# Relative to the maximum: beyond a few thousand positions the response approaches zero and changes sign.
LEAST_RESPONSE = 0.05


def text_raters(visual_VC: Tensor, text_QC: Tensor) -> Tensor:
    """[Q] bool mask of text tokens whose similarity to the visual tokens is above average.

    r_i = mean over visual j of softmax over text of (H_v H_t^T)_ji, without scaling; raters have r_i > mean(r). If no
    token is above average (e.g. a single token), all text tokens are raters. Source: section 3.2.
    """
    alike = torch.softmax(visual_VC.float() @ text_QC.float().T, dim=-1).mean(dim=0)
    raters = alike > alike.mean()
    return raters | ~raters.any()


def relative_attention(attention_HQV: Tensor, ones_QD: Tensor, ones_VD: Tensor) -> Tensor:
    """[H, Q, V]: attention divided by the position-only response, the dot product of rotated all-ones vectors.

    At a distance of n positions that product is 2 times the sum over frequencies f of cos(n f). It is divided by its
    maximum and clamped to at least :data:`LEAST_RESPONSE`. Source: SparseVLM+'s code.
    """
    response = (ones_QD.float() @ ones_VD.float().T) / ones_QD.float().square().sum(dim=1, keepdim=True)
    return attention_HQV / response.clamp(min=LEAST_RESPONSE)


def most_visual_heads(attention_HQV: Tensor, raters_Q: Tensor, num_heads: int) -> Tensor:
    """[num_heads, Q, V]: the heads in which raters attend most to visual tokens; ties go to the lower head index."""
    mass = (attention_HQV * raters_Q[:, None]).sum(dim=(1, 2))
    return attention_HQV.index_select(0, torch.sort(mass, descending=True, stable=True).indices[:num_heads])


def numerical_rank(attention_QV: Tensor) -> Tensor:
    """Scalar int64: number of singular values above max(Q, V) * eps(float32) * largest singular value, as in
    torch.linalg.matrix_rank."""
    values = torch.linalg.svdvals(attention_QV.double())
    least = values[:1] * max(attention_QV.shape) * torch.finfo(torch.float32).eps
    return (values > least).sum()


@torch.no_grad()
def raters_per_segment(candidates: Candidates) -> list[Tensor]:
    """For each segment with images, a [Q] bool mask of the instruction rows that are raters."""
    boundary = candidates.boundary
    visual = candidates.hidden.split(visual_per_segment(boundary))
    text = [candidates.instruction[segment.query_start : segment.query_end] for segment in boundary.segments]
    return [text_raters(visual_VC, rows) for visual_VC, rows in zip(visual, text, strict=True)]


def rating_attention(candidates: Candidates, raters: Sequence[Tensor], heads: float) -> list[Tensor]:
    """For each image, [Q, V] float32 attention of the raters divided by the number of raters; rows of other text tokens
    are 0.

    Averaged over the selected fraction ``heads`` of the heads, and divided by the position-only response if ``gravity``
    is set.
    """
    boundary, ranking, ratings = candidates.boundary, candidates.ranking, []
    assert ranking is not None
    sizes = [[span.before for span in spans] for _, spans in groupby(boundary.spans, lambda span: span.segment)]
    ones: Sequence[tuple[Tensor, Tensor] | None] = [None] * len(sizes)
    if ranking.ones is not None:
        rows = [segment.query_end - segment.query_start for segment in boundary.segments]
        visual = [sum(span_sizes) for span_sizes in sizes]
        ones = list(zip(ranking.ones[0].split(rows), ranking.ones[1].split(visual), strict=True))
    attention_HQV = visual_attention(ranking, boundary)
    for attention, rates, rotated, span_sizes in zip(attention_HQV, raters, ones, sizes, strict=True):
        if rotated is not None:
            attention = relative_attention(attention, *rotated)
        if heads < 1:
            attention = most_visual_heads(attention, rates, max(1, round_of(heads, len(attention))))
        ratings += (attention.mean(dim=0) * (rates / rates.sum())[:, None]).split(span_sizes, dim=1)
    return ratings
