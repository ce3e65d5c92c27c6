"""Token selection from scores: pure functions without device-to-host copies.

Shape suffixes: T tokens, V visual tokens, K kept visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vtprune_train.core.stream import Boundary, SpanLayout, to_device


def top_k_per_span(scores_V: Tensor, span_V: Tensor, take_K: Tensor) -> Tensor:
    """Top-k tokens of each span in their original order; ties go to the earlier token.

    Args:
        scores_V: [V] float32.
        span_V: [V] int64, the span of each token, ascending.
        take_K: [K] int64, positions of each span's first k entries after sorting V by (span, descending score).

    Returns:
        [K] int64, ascending indices into V.
    """
    by_score = torch.sort(scores_V, descending=True, stable=True).indices
    by_span = torch.sort(span_V.index_select(0, by_score), stable=True).indices
    best = by_score.index_select(0, by_span).index_select(0, take_K)
    return torch.sort(best).values


def next_rows(boundary: Boundary, chosen_K: Tensor) -> Tensor:
    """[T_next] int64, indices of the rows that enter the next stage, in order: all text tokens and the kept visual
    tokens."""
    rows = torch.cat([boundary.text_rows, boundary.visual_rows.index_select(0, chosen_K)])
    return rows.index_select(0, boundary.next_order)


def all_candidates(boundary: Boundary) -> Tensor:
    """[V] int64, indices of all candidates in order."""
    return torch.arange(len(boundary.span_of_visual), device=boundary.span_of_visual.device)


def picked_on_host(boundary: Boundary, pick: Callable[[SpanLayout], np.ndarray]) -> Tensor:
    """Select candidates on the host, from layout information only.

    Args:
        boundary: a drop point without ``returns``.
        pick: function returning, for an image, int64 indices among its remaining tokens.

    Returns:
        int64 candidate indices for all images, on the boundary's device.
    """
    picks, start = [np.zeros(0, dtype=np.int64)], 0
    for span in boundary.spans:
        picks.append(start + pick(span))
        start += span.before
    return to_device(np.concatenate(picks), boundary.span_of_visual.device)
