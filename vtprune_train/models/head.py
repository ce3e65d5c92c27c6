"""The language-model head and its loss over supervised rows, in chunks: a step's logits never exist at once.

Shape suffixes: R supervised rows, C hidden size, N vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_LOGITS = 2**25  # logits that exist at a time: 128 MiB in float32


@dataclass
class Teaching:
    """[R, C] ``hidden`` of another pass that the first is drawn to, without a gradient of its own; ``weight`` of the
    divergence in the loss; ``temperature`` that softens both."""

    hidden: Tensor
    weight: float
    temperature: float


def chunked_cross_entropy(
    hidden_RC: Tensor, weight_NC: Tensor, bias_N: Tensor | None, targets_R: Tensor, chunk_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy over rows, and whether the most likely token is the target.

    Gradients are made in the forward pass, chunk by chunk, so the head's weight is read only while it is there (under
    ZeRO-3 it is partitioned again before the backward pass).

    Returns:
        ``loss_sum`` [] float32 and ``correct`` [R] bool. No rows give a zero that is still part of the graph.
    """
    loss, correct, _, _ = chunked_consistency(hidden_RC, weight_NC, bias_N, targets_R, None, chunk_rows)
    return loss, correct


def chunked_consistency(
    hidden_RC: Tensor,
    weight_NC: Tensor,
    bias_N: Tensor | None,
    targets_R: Tensor,
    teaching: Teaching | None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy + weight * T^2 * KL(teacher || model) at temperature T, summed over rows, in one pass over chunks.

    Source: the self-distillation of DualSpeed (arXiv 2602.03815), in the direction of its published code: the teacher's
    distribution weighs the logarithms.

    Returns:
        ``loss_sum`` [] float32, ``correct`` [R] bool, and for reading ``cross_entropy`` and ``divergence`` (T^2 * KL),
        [] float32.
    """
    rows = chunk_rows or max(1, CHUNK_LOGITS // weight_NC.shape[0] // (1 if teaching is None else 3))
    # Inside a Function autograd is always off, so whether gradients are wanted at all is asked here.
    return _ChunkedLoss.apply(hidden_RC, weight_NC, bias_N, targets_R, teaching, rows, torch.is_grad_enabled())  # type: ignore[no-any-return]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        teaching: Teaching | None,
        chunk_rows: int,
        grad: bool,
    ) -> tuple[Tensor, ...]:
        wants_hidden, wants_weight, wants_bias = (grad and needed for needed in ctx.needs_input_grad[:3])
        loss = hidden.new_zeros((), dtype=torch.float32)
        divergence = torch.zeros_like(loss)
        correct = torch.empty_like(targets, dtype=torch.bool)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wants_bias else None
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = F.linear(hidden[rows], weight, bias).float()
            correct[rows] = logits.argmax(dim=-1) == targets[rows]
            loss += F.cross_entropy(logits, targets[rows], reduction="sum")
            grad_logits = logits.softmax(dim=-1)
            grad_logits[torch.arange(len(grad_logits), device=grad_logits.device), targets[rows]] -= 1.0
            if teaching is not None:
                taught = F.linear(teaching.hidden[rows], weight, bias).float()
                divergence += _diverge(logits, taught, teaching, grad_logits)
            if not (wants_hidden or wants_weight or wants_bias):
                continue
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0)
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.matmul(grad_logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden[rows]
        ctx.grads = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        cross_entropy = loss.clone()
        if teaching is not None:
            loss += teaching.weight * divergence
        ctx.mark_non_differentiable(correct, cross_entropy, divergence)
        return loss, correct, cross_entropy, divergence

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads = tuple(None if grad is None else grad * grad_outputs[0].to(grad.dtype) for grad in ctx.grads)
        return (*grads, None, None, None, None)


def _diverge(logits: Tensor, taught: Tensor, teaching: Teaching, grad_logits: Tensor) -> Tensor:
    """T^2 * KL(teacher || model) summed over a chunk's rows; adds its weighted gradient to ``grad_logits`` in place."""
    softened = teaching.temperature
    log_model = (logits / softened).log_softmax(dim=-1)
    log_teacher = (taught / softened).log_softmax(dim=-1)
    teacher = log_teacher.exp()
    grad_logits += teaching.weight * softened * (log_model.exp() - teacher)
    return softened**2 * (teacher * (log_teacher - log_model)).sum()
