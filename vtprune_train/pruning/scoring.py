"""What a visual token is worth: pure functions on a layer's queries and keys.

Shape suffixes: T tokens in the stream, V visual tokens, Q query rows, L tokens of one segment, H query heads,
G key-value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune_train.stream import Boundary


def mean_query_attention(queries_QHD: Tensor, keys_TGD: Tensor, scaling: float, boundary: Boundary) -> Tensor:
    """Attention that each visual token receives from its segment's query rows, averaged over heads, then rows.

    The softmax (float32) runs over the whole causal row, text and visual keys alike, but is computed for the query
    rows only: O(Q L) instead of O(L^2). Source: PyramidDrop (arXiv 2410.17247), the published code's ranking.

    Args:
        queries_QHD: rotated queries of ``boundary.query_rows``, any float dtype.
        keys_TGD: rotated keys of the stream; H must be a multiple of G (grouped queries).
        scaling: multiplies the products, 1 / sqrt(D) for Llama.
        boundary: names segments and visual rows.

    Returns:
        [V] float32, in the order of ``boundary.visual_rows``. Tokens after a query row receive nothing from it.
    """
    scores = []
    for segment in boundary.segments:
        rows = slice(segment.query_start, segment.query_end)
        queries, keys = queries_QHD[rows], keys_TGD[segment.start : segment.end]
        num_rows, num_heads, head_dim = queries.shape
        grouped = queries.view(num_rows, keys.shape[1], -1, head_dim).permute(1, 2, 0, 3)  # [G, H / G, Q, D]
        logits = torch.matmul(grouped.flatten(1, 2), keys.permute(1, 2, 0)) * scaling  # [G, H / G * Q, L]
        logits = logits.view(num_heads, num_rows, -1)
        key_rows = torch.arange(segment.start, segment.end, device=keys.device)
        future = key_rows > boundary.query_rows[rows, None]
        attention = logits.float().masked_fill(future, float("-inf")).softmax(dim=-1)
        scores.append(attention.mean(dim=0).mean(dim=0))
    if not scores:
        return queries_QHD.new_zeros(0, dtype=torch.float32)
    return torch.cat(scores).index_select(0, boundary.visual_in_scored)
