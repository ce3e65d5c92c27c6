"""The operators behind ``torch.nn.attention.varlen``, which CUDA alone has, computed on the CPU for ``fake_cuda``."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn  # noqa: F401, registers the operators

from tests.support.fake_cuda import EMULATED


def _segments(
    queries: Tensor, keys: Tensor, cu_q: Tensor, cu_k: Tensor, is_causal: bool, scale: Any, window_size: Any
) -> Any:
    """For each segment its query rows, its key rows, and the weights [H, L, S] float32; query heads share key heads."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q[-1] == len(queries) and cu_k[-1] == len(keys)
    left, right = window_size or (-1, -1)
    factor = queries.shape[-1] ** -0.5 if scale is None else scale
    for rows_q, rows_k in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        of_q, of_k = slice(*rows_q), slice(*rows_k)
        q, k = queries[of_q].float(), _per_query_head(keys[of_k].float(), queries)
        distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        seen = torch.ones_like(distance, dtype=torch.bool)
        seen &= distance >= 0 if is_causal or right == 0 else seen
        seen &= distance <= left if left >= 0 else seen
        scores = torch.einsum("lhd,shd->hls", q, k) * factor
        yield of_q, of_k, factor, scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)


def _per_query_head(rows: Tensor, queries: Tensor) -> Tensor:
    return rows.repeat_interleave(queries.shape[1] // rows.shape[1], dim=1)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, is_causal: bool = False,
    scale: Any = None, window_size: Any = None, *_: Any, **__: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    assert int(cu_q.diff().max()) == max_q and int(cu_k.diff().max()) == max_k
    out = torch.empty_like(q)
    for of_q, of_k, _factor, weights in _segments(q, k, cu_q, cu_k, is_causal, scale, window_size):
        out[of_q] = torch.einsum("hls,shd->lhd", weights, _per_query_head(v[of_k].float(), q)).to(q.dtype)
    return out, q.new_zeros(q.shape[1], len(q), dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int,
    max_k: int, is_causal: bool, rng_state: Tensor, scale: Any = None, window_size: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for of_q, of_k, factor, weights in _segments(q, k, cu_q, cu_k, is_causal, scale, window_size):
        own = grad[of_q].float()
        of_weights = torch.einsum("lhd,shd->hls", own, _per_query_head(v[of_k].float(), q))
        of_scores = weights * (of_weights - (of_weights * weights).sum(dim=-1, keepdim=True)) * factor
        keys = _per_query_head(k[of_k].float(), q)
        grad_q[of_q] = torch.einsum("hls,shd->lhd", of_scores, keys).to(q.dtype)
        for whole, heads in (
            (grad_k, torch.einsum("hls,lhd->shd", of_scores, q[of_q].float())),
            (grad_v, torch.einsum("hls,lhd->shd", weights, own)),
        ):
            whole[of_k] = heads.unflatten(1, (whole.shape[1], -1)).sum(dim=2).to(whole.dtype)
    return grad_q, grad_k, grad_v


EMULATED[torch.ops.torch_attn._varlen_attn.default] = _forward
EMULATED[torch.ops.torch_attn._varlen_attn_backward.default] = _backward
