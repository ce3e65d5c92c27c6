"""The chunked head."""

import pytest
import torch
import torch.nn.functional as F

from vtprune_train.models.forward.head import chunked_loss, default_chunk_rows


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_plain_cross_entropy(chunk, with_bias):
    torch.manual_seed(0)
    hidden = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(17, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(17, dtype=torch.float64, requires_grad=True) if with_bias else None
    targets = torch.randint(0, 17, (10,))
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    loss, correct, row_loss, _ = chunked_loss(hidden, weight, bias, targets, chunk_rows=chunk)
    logits = F.linear(hidden, weight, bias)
    expected = F.cross_entropy(logits, targets, reduction="sum")
    assert abs(loss - expected) < 1e-4  # summed in float32
    assert torch.equal(correct, logits.argmax(-1) == targets)
    assert (row_loss - F.cross_entropy(logits, targets, reduction="none")).abs().max() < 1e-5
    assert not row_loss.requires_grad
    for ours, theirs in zip(
        torch.autograd.grad(3 * loss, inputs), torch.autograd.grad(3 * expected, inputs), strict=True
    ):
        assert (ours - theirs).abs().max() < 1e-5


def test_no_rows_give_a_zero_that_reaches_the_weights():
    hidden = torch.randn(0, 8, requires_grad=True)
    weight = torch.randn(17, 8, requires_grad=True)
    loss, correct, *_ = chunked_loss(hidden, weight, None, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and len(correct) == 0
    assert weight.grad is not None and not weight.grad.any()


def test_frozen_weight_gets_no_gradient():
    hidden = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(17, 8)
    loss, *_ = chunked_loss(hidden, weight, None, torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert hidden.grad is not None and weight.grad is None


def test_a_scale_is_not_rounded_to_half_precision():
    torch.manual_seed(0)
    hidden = torch.randn(6, 8).bfloat16().requires_grad_()
    weight = torch.randn(17, 8).bfloat16().requires_grad_()
    loss, *_ = chunked_loss(hidden, weight, None, torch.randint(0, 17, (6,)))
    plain = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    scale = 0.33463541  # 0.2 % above its nearest bfloat16
    for grad, scaled in zip(plain, torch.autograd.grad(loss * scale, (hidden, weight)), strict=True):
        assert scaled.dtype == torch.bfloat16
        assert torch.equal(scaled, (grad.float() * scale).bfloat16())


@pytest.mark.parametrize(("vocab", "rows"), [(32_000, 1048), (152_064, 1024), (400, 83886)])
def test_rows_of_a_chunk(vocab, rows):
    assert default_chunk_rows(vocab) == rows
    assert default_chunk_rows(vocab, taught=True) == rows // 3
