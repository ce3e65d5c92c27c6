"""Which tokens stay, given scores: pure functions without device-to-host copies.

Shape suffixes: T tokens, V visual tokens, K kept visual tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_per_span(scores_V: Tensor, span_V: Tensor, take_K: Tensor) -> Tensor:
    """The best tokens of every span in their old order; equal scores go to the earlier token.

    Args:
        scores_V: [V] float32.
        span_V: [V] int64, the span of each token, ascending.
        take_K: [K] int64, positions to take once V is sorted by (span, descending score): the first k of each span.

    Returns:
        [K] int64, ascending indices into V.
    """
    by_score = torch.sort(scores_V, descending=True, stable=True).indices
    by_span = torch.sort(span_V.index_select(0, by_score), stable=True).indices
    best = by_score.index_select(0, by_span).index_select(0, take_K)
    return torch.sort(best).values


def kept_rows(text_rows: Tensor, visual_rows_V: Tensor, chosen_K: Tensor) -> Tensor:
    """Rows of the stream that enter the next stage: all text and the chosen visual tokens, in stream order."""
    return torch.sort(torch.cat([text_rows, visual_rows_V.index_select(0, chosen_K)])).values
