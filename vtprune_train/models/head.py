"""The language-model head and its cross-entropy over supervised rows, in chunks: a step's logits never exist at once.

Shape suffixes: R supervised rows, C hidden size, N vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_LOGITS = 2**25  # logits that exist at a time: 128 MiB in float32


class RowLosses(NamedTuple):
    """``loss_sum`` [] float32, the only one with a gradient; ``correct`` [R] bool, whether the most likely token is the
    target; ``row_loss`` [R] float32, which sum up to ``loss_sum``."""

    loss_sum: Tensor
    correct: Tensor
    row_loss: Tensor


def chunked_cross_entropy(
    hidden_RC: Tensor, weight_NC: Tensor, bias_N: Tensor | None, targets_R: Tensor, chunk_rows: int | None = None
) -> RowLosses:
    """The cross-entropy of each row, and its sum.

    Gradients are made in the forward pass, chunk by chunk, so the head's weight is read only while it is there (under
    ZeRO-3 it is partitioned again before the backward pass).

    No rows give a zero that is still part of the graph.
    """
    rows = chunk_rows or max(1, CHUNK_LOGITS // weight_NC.shape[0])
    # Inside a Function autograd is always off, so whether gradients are wanted at all is asked here.
    return RowLosses(
        *_ChunkedCrossEntropy.apply(hidden_RC, weight_NC, bias_N, targets_R, rows, torch.is_grad_enabled())
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk_rows: int, grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight, wants_bias = (grad and needed for needed in ctx.needs_input_grad[:3])
        row_loss = torch.empty_like(targets, dtype=torch.float32)
        correct = torch.empty_like(targets, dtype=torch.bool)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wants_bias else None
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = F.linear(hidden[rows], weight, bias).float()
            correct[rows] = logits.argmax(dim=-1) == targets[rows]
            row_loss[rows] = F.cross_entropy(logits, targets[rows], reduction="none")
            if not (wants_hidden or wants_weight or wants_bias):
                continue
            grad_logits = logits.softmax(dim=-1)
            grad_logits[torch.arange(len(grad_logits), device=grad_logits.device), targets[rows]] -= 1.0
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
        ctx.mark_non_differentiable(correct, row_loss)
        return row_loss.sum(), correct, row_loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads = tuple(None if grad is None else grad * grad_outputs[0].to(grad.dtype) for grad in ctx.grads)
        return (*grads, None, None, None)
