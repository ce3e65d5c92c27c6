"""Backends of packed attention."""

import inspect
import math

import pytest
import torch

from tests.support.helpers import tiny_model
from vtprune_train.models import patch
from vtprune_train.models.forward import attention, backend

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
    with pytest.raises(ValueError, match=r"varlen_torch.*needs float16 or bfloat16, not torch.float32"):
        attention.choose_backend("varlen_torch", torch.device("cuda"), torch.float32)


def test_unknown_backend():
    with pytest.raises(ValueError, match="'flsh' is unknown"):
        attention.choose_backend("flsh", CPU, torch.float32)


CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """``gpu((9, 0))`` makes a GPU of that compute capability, with the named flash-attn packages installed, or all."""

    def make(capability, installed=attention.FLASH):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        for name in attention.FLASH:
            monkeypatch.setitem(attention.FLASH_INSTALLED, name, lambda name=name: name in installed)

    return make


@pytest.mark.parametrize(
    ("capability", "head_dim", "expected"),
    [
        ((7, 5), 128, "varlen_sdpa"),
        ((8, 0), 128, "flash_attention_2"),
        ((8, 6), 256, "flash_attention_2"),
        ((9, 0), 128, "flash_attention_4"),
        ((9, 0), 192, "flash_attention_4"),
        ((9, 0), 80, "flash_attention_4"),
        ((9, 0), 100, "flash_attention_2"),  # pads; the others take multiples of 8
        ((10, 0), 128, "flash_attention_4"),
        ((10, 0), 192, "flash_attention_2"),
        ((10, 3), 256, "flash_attention_4"),
        ((12, 0), 128, "flash_attention_4"),
        ((12, 0), 256, "flash_attention_2"),
        ((9, 0), 512, "varlen_sdpa"),
    ],
)
def test_auto_takes_the_newest_kernel_that_the_gpu_and_the_head_size_allow(gpu, capability, head_dim, expected):
    gpu(capability)
    assert attention.choose_backend("auto", CUDA, torch.bfloat16, head_dim) == expected


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), "varlen_sdpa"), ((8, 9), "varlen_torch"), ((10, 0), "varlen_torch")]
)
def test_auto_without_packages(gpu, capability, expected):
    gpu(capability, installed=())
    assert attention.choose_backend("auto", CUDA, torch.bfloat16, 128) == expected


def test_flash_attention_3_is_for_hopper_alone(gpu):
    gpu((9, 0), installed=("flash_attention_3",))
    assert attention.choose_backend("auto", CUDA, torch.bfloat16, 128) == "flash_attention_3"
    gpu((10, 0), installed=("flash_attention_3",))
    assert attention.choose_backend("auto", CUDA, torch.bfloat16, 128) == "varlen_torch"


def test_refusals_name_the_gpu_and_the_head_size(gpu, caplog):
    gpu((8, 6))
    with pytest.raises(ValueError, match=r"flash_attention_3.*needs compute capability 9\.x, this GPU has 8\.6"):
        attention.choose_backend("flash_attention_3", CUDA, torch.bfloat16, 128)
    gpu((7, 5))
    with pytest.raises(ValueError, match=r"varlen_torch.*8\.x to 12\.x, this GPU has 7\.5; use attention=auto"):
        attention.choose_backend("varlen_torch", CUDA, torch.float16, 128)
    gpu((10, 0), installed=("flash_attention_4",))
    with caplog.at_level("INFO", logger=attention.__name__):
        attention.choose_backend("auto", CUDA, torch.bfloat16, 192)
    assert "varlen_torch (flash_attention_4 has no kernel for head_dim=192 at this GPU's" in caplog.text
    assert "flash_attention_2 needs its flash-attn package" in caplog.text


def test_prune_looks_at_the_head_size(gpu, monkeypatch):
    gpu((9, 0))
    asked = []
    monkeypatch.setattr(backend, "choose_backend", lambda *args: asked.append(args) or "varlen_sdpa")
    patch.prune(tiny_model(), None)
    assert asked == [("auto", CPU, torch.float32, 8)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("keyword", [{"enable_gqa": True}, {}], ids=["torch 2.13", "torch 2.11"])
def test_varlen_torch_hands_over_grouped_keys_as_they_are(heads, kv_heads, window, keyword, monkeypatch):
    """With a stand-in for the CUDA kernel: what it is told, and the result."""
    torch.manual_seed(0)
    lengths = (30, 5, 31)
    q, k, v = random_qkv(sum(lengths), heads, kv_heads)
    told = {}

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, **more):
        assert cu_seq_q is cu_seq_k is cu_seqlens and max_q == max_k == 31
        assert window_size == ((-1, 0) if window is None else (window - 1, 0))
        told.update(more, heads=(query.shape[1], key.shape[1], value.shape[1]))
        return naive(query, key, value, cu_seq_q.diff().tolist(), scale, window)

    cu_seqlens = torch.tensor([0, 30, 35, 66], dtype=torch.int32)
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_GROUPED", keyword)
    out = attention.varlen_torch(
        q, k, v, cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, max_length_q=31, max_length_k=31, scaling=0.25,
        sliding_window=window,
    )  # fmt: skip
    assert told == {**(keyword if kv_heads < heads else {}), "heads": (heads, kv_heads, kv_heads)}
    reference = attention.varlen_sdpa(q, k, v, segment_lengths=lengths, scaling=0.25, sliding_window=window)
    assert (out - reference).abs().max() < 1e-10


def test_the_installed_varlen_attn_takes_what_varlen_torch_passes():
    parameters = inspect.signature(attention.varlen_attn).parameters
    assert {"scale", "window_size", *attention._GROUPED} <= parameters.keys()
    assert ("enable_gqa" in parameters) == bool(attention._GROUPED)
