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
    num_heads, groups = queries_QHD.shape[1], keys_TGD.shape[1]
    scaled = (queries_QHD * scaling).unflatten(1, (groups, -1)).permute(1, 2, 0, 3)  # [G, H / G, Q, D]
    keys_GDT = keys_TGD.permute(1, 2, 0)
    stream_rows = torch.arange(keys_TGD.shape[0], device=keys_TGD.device)
    scores = []
    for segment in boundary.segments:
        queries, own = slice(segment.query_start, segment.query_end), slice(segment.start, segment.end)
        logits = torch.matmul(scaled[:, :, queries].flatten(1, 2), keys_GDT[:, :, own])  # [G, H / G * Q, L]
        future = stream_rows[own] > boundary.query_rows[queries, None]
        logits = logits.view(num_heads, -1, logits.shape[-1]).masked_fill(future, float("-inf"))
        scores.append(logits.softmax(dim=-1, dtype=torch.float32).mean(dim=(0, 1)))
    if not scores:
        return queries_QHD.new_zeros(0, dtype=torch.float32)
    return torch.cat(scores).index_select(0, boundary.visual_in_scored)
