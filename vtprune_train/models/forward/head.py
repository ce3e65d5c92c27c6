"""LM head and loss over the supervised rows: chunked for packed batches, whose full logits are never materialized, and
for padded rows without a gradient of the full logits.

Shape suffixes: R supervised rows, C hidden size, N vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss, fixed_cross_entropy

from vtprune_train.core.stream import IGNORE
from vtprune_train.models.forward.sharding import partitions_weight

SUPERVISED = "_vtprune_supervised"  # attribute of logits: their supervised rows, and the logits of these with gradients
CHUNK_LOGITS = 2**25  # number of logits per chunk: 128 MiB in float32
# Larger chunks for a large vocabulary: each chunk reads and writes the whole weight gradient, so with few rows per
# chunk memory traffic would dominate.
LEAST_ROWS = 1024


@dataclass
class Teaching:
    """Distillation targets: teacher hidden states ``hidden`` [R, C] (no gradient), the ``weight`` of the KL term, and
    the softmax ``temperature``."""

    hidden: Tensor
    weight: float
    temperature: float


def chunked_loss(
    hidden_RC: Tensor,
    weight_NC: Tensor,
    bias_N: Tensor | None,
    targets_R: Tensor,
    teaching: Teaching | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy summed over rows, plus weight * T^2 * KL(teacher || model) at temperature T if a teacher is given.

    Gradients are computed chunk by chunk in the forward pass, while the head's weight is gathered (under ZeRO-3 it is
    partitioned again before backward).

    Source: the self-distillation of DualSpeed (arXiv 2602.03815), with the KL direction of its published code: the
    expectation is taken over the teacher's distribution.

    Returns:
        ``loss_sum`` [] float32, ``correct`` [R] bool (whether the most likely token is the target), and for logging
        only ``row_loss`` [R] float32, the cross-entropy of each row, and ``divergence`` (T^2 * KL), [] float32. Without
        rows the loss is a zero that is still part of the graph.
    """
    rows = chunk_rows or default_chunk_rows(weight_NC.shape[0], teaching is not None)
    # Check here whether gradients are needed, because grad mode is always off inside autograd.Function.forward.
    return _ChunkedLoss.apply(hidden_RC, weight_NC, bias_N, targets_R, teaching, rows, torch.is_grad_enabled())  # type: ignore[no-any-return]


def with_supervised(head: nn.Linear, logits_BLN: Tensor, hidden_BLC: Tensor, rows_R: Tensor) -> Tensor:
    """Attach the logits of the rows that predict a supervised token, for :func:`supervised_loss`. Nothing else is
    changed: a loss on ``logits_BLN`` itself still has its gradients."""
    if type(head) is nn.Linear and not partitions_weight(head):
        of_rows = F.linear(hidden_BLC.flatten(0, 1).index_select(0, rows_R), head.weight, head.bias)
        setattr(logits_BLN, SUPERVISED, (rows_R, of_rows))
    return logits_BLN


def supervised_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | None = None,
    ignore_index: int = IGNORE,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' loss of causal language models, computed from the supervised rows alone if they are attached: most
    rows of a batch with images are not supervised, and their softmax and gradients would be computed only to be
    multiplied by zero."""
    rows, of_rows = getattr(logits, SUPERVISED, (None, None))
    if rows is None or of_rows is None or shift_labels is not None or ignore_index != IGNORE:
        return ForCausalLMLoss(
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
        )  # fmt: skip
    targets = F.pad(labels, (0, 1), value=IGNORE)[:, 1:].flatten().to(rows.device).index_select(0, rows)
    return fixed_cross_entropy(of_rows.float(), targets, num_items_in_batch, ignore_index, **kwargs)


def default_chunk_rows(vocab: int, taught: bool = False) -> int:
    """Number of rows per chunk. Peak memory is about two float32 copies of the chunk's logits; with a teacher about
    three times that."""
    return max(LEAST_ROWS, CHUNK_LOGITS // vocab) // (3 if taught else 1)


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
        row_loss = torch.empty_like(targets, dtype=torch.float32)
        divergence = row_loss.new_zeros(())
        correct = torch.empty_like(targets, dtype=torch.bool)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wants_bias else None
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = F.linear(hidden[rows], weight, bias).float()
            target = targets[rows].unsqueeze(1)
            correct[rows] = logits.argmax(dim=-1, keepdim=True).eq(target).squeeze(1)
            log_sum = logits.logsumexp(dim=-1, keepdim=True)
            row_loss[rows] = (log_sum - logits.gather(1, target)).squeeze(1)
            pull = None
            if teaching is not None:
                taught = F.linear(teaching.hidden[rows], weight, bias).float()
                chunk_divergence, pull = _diverge(logits, taught, teaching)
                divergence += chunk_divergence
            if not (wants_hidden or wants_weight or wants_bias):
                continue
            grad_logits = logits.sub_(log_sum).exp_()  # softmax computed in place of the logits
            grad_logits.scatter_add_(1, target, grad_logits.new_full((1, 1), -1.0).expand_as(target))
            if pull is not None:
                grad_logits += pull
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
        loss = row_loss.sum()
        if teaching is not None:
            loss += teaching.weight * divergence
        ctx.mark_non_differentiable(correct, row_loss, divergence)
        return loss, correct, row_loss, divergence

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # In float32: a scale rounded to bfloat16 would scale the whole gradient of the head by up to 0.4 % too much or
        # too little.
        scale = grad_outputs[0].float().reshape(1)
        grads = [
            None if grad is None else torch.mul(grad, scale.expand((1,) * grad.ndim), out=torch.empty_like(grad))
            for grad in ctx.grads
        ]
        return (*grads, None, None, None, None)


def _diverge(logits: Tensor, taught: Tensor, teaching: Teaching) -> tuple[Tensor, Tensor]:
    """Return T^2 * KL(teacher || model), summed over the chunk, and its weighted gradient."""
    softened = teaching.temperature
    log_model = (logits / softened).log_softmax(dim=-1)
    log_teacher = (taught / softened).log_softmax(dim=-1)
    teacher = log_teacher.exp()
    divergence = softened**2 * (teacher * (log_teacher - log_model)).sum()
    return divergence, teaching.weight * softened * (log_model.exp() - teacher)
