"""Backends of packed attention."""

import math

import pytest
import torch

from vtprune_train.models import attention

CPU = torch.device("cpu")


def naive(q, k, v, lengths, scaling, window=None):
    """Masked softmax over the whole stream: [T, H, D]."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    row = torch.arange(len(q))
    allowed = (segment[:, None] == segment[None, :]) & (row[:, None] >= row[None, :])
    if window is not None:
        allowed &= row[:, None] - row[None, :] < window
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scaling
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def random_qkv(total, heads, kv_heads, dim=16):
    return tuple(
        torch.randn(total, n, dim, dtype=torch.float64, requires_grad=True) for n in (heads, kv_heads, kv_heads)
    )


@pytest.mark.parametrize("lengths", [(7,), (1, 1, 1), (30, 31, 29, 5, 30), (600, 20, 22, 590, 3)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 8])
def test_varlen_sdpa_equals_a_naive_masked_softmax(lengths, heads, kv_heads, window):
    torch.manual_seed(0)
    q, k, v = random_qkv(sum(lengths), heads, kv_heads)
    scaling = 1 / math.sqrt(q.shape[-1])
    ours = attention.varlen_sdpa(q, k, v, segment_lengths=lengths, scaling=scaling, sliding_window=window)
    expected = naive(q, k, v, lengths, scaling, window)
    weight = torch.randn_like(expected)
    ours_grads = torch.autograd.grad((ours * weight).sum(), (q, k, v))
    expected_grads = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for a, b in zip((ours, *ours_grads), (expected, *expected_grads), strict=True):
        assert (a - b).abs().max() < 1e-10


def test_short_segments_share_calls_and_long_ones_do_not():
    assert attention._plan_calls((30, 31, 29), CPU).shapes == ((3, 31),)
    assert attention._plan_calls((600, 599), CPU).shapes == ((1, 600), (1, 599))


def test_auto_takes_what_works_here_and_others_are_refused_with_the_way_out():
    assert attention.choose_backend("auto", CPU, torch.bfloat16) == "varlen_sdpa"
    assert attention.choose_backend("auto", torch.device("cuda"), torch.float32) == "varlen_sdpa"
    with pytest.raises(ValueError, match=r"flash_attention_2.*needs CUDA.*attention=auto"):
        attention.choose_backend("flash_attention_2", CPU, torch.bfloat16)
    with pytest.raises(ValueError, match=r"varlen_torch.*needs half precision, not torch.float32"):
        attention.choose_backend("varlen_torch", torch.device("cuda"), torch.float32)


def test_unknown_backend():
    with pytest.raises(ValueError, match="'flsh' is unknown"):
        attention.choose_backend("flsh", CPU, torch.float32)
