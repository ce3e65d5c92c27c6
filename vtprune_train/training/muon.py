"""Muon for matrices and AdamW for all other parameters, as one optimizer that works at every ZeRO stage.

``torch.optim.Muon`` needs whole matrices. Under ZeRO 1 to 3 an optimizer gets flat tensors, this rank's part of each
parameter group, and a matrix may be split between ranks. The momentum is elementwise, so it is a flat tensor that
checkpoints can distribute to any number of ranks. Only the orthogonalization needs whole matrices: a split matrix is
sent to one rank, orthogonalized there and sent back.

DeepSpeed's own Muon is not used, for three reasons. Under ZeRO 1 and 2 its momentum contains whole matrices, so it
cannot be resumed with another number of ranks; clipping and the gradient norm apply to orthogonalized updates; and
under ZeRO-3 it requires ``reduce_scatter: false``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Shard:
    """``numel`` elements of a flattened matrix that ``rank`` stores at ``offset`` of its flat tensor."""

    rank: int
    numel: int
    offset: int


@dataclass(frozen=True)
class Matrix:
    """A matrix in a flat tensor: its shape and its shards, in order, at most one per rank."""

    shape: torch.Size
    shards: tuple[Shard, ...]

    def __post_init__(self) -> None:
        holders = [shard.rank for shard in self.shards]
        assert holders == sorted(set(holders)), "shards must be in the order of ranks"
        assert sum(shard.numel for shard in self.shards) == self.shape.numel()

    def of_rank(self, rank: int) -> Shard:
        """The shard of a rank; empty if it has none."""
        return next((shard for shard in self.shards if shard.rank == rank), Shard(rank, 0, 0))


class Muon(torch.optim.Optimizer):
    """Muon (arXiv 2502.16982) for groups with ``muon: True``, AdamW for all others.

    Args:
        params: parameter groups.
        lr, weight_decay: defaults for groups of both kinds.
        betas: of AdamW.
        momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: as in ``torch.optim.Muon``. With
            ``match_rms_adamw`` an update is as large as AdamW's, so that both can use AdamW's learning rates.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Sequence[float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "muon": False})
        self._momentum, self._nesterov = momentum, nesterov
        self._newton_schulz = {
            "ns_coefficients": tuple(ns_coefficients), "eps": eps, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn,
        }  # fmt: skip
        placeholder = nn.Parameter(torch.zeros(1, 1))
        self._orthogonalized(placeholder.detach())  # raises if torch.optim.Muon refuses the arguments
        self._adamw = torch.optim.AdamW([placeholder], betas=betas, fused=True)
        for group in self.param_groups:
            if not group["muon"]:
                for key, value in self._adamw.defaults.items():
                    group.setdefault(key, value)
        self._matrices: Mapping[Tensor, Sequence[Matrix]] = {}
        self._device: torch.device | None = None

    def bind(self, matrices: Mapping[Tensor, Sequence[Matrix]], device: torch.device) -> None:
        """Define which matrices each flat tensor of the ``muon`` groups contains, in the same order on all ranks. They
        are orthogonalized on ``device``. A tensor that is not in ``matrices`` is a whole matrix."""
        self._matrices, self._device = matrices, device

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient. All ranks call this together, with the same groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["muon"]:
                for tensor in group["params"]:
                    if tensor.grad is not None:
                        self._update(tensor, group["lr"], group["weight_decay"])
        self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw.state = self.state
        self._adamw.step()
        return loss

    def _update(self, tensor: Tensor, rate: float, weight_decay: float) -> None:
        """Apply a step of ``torch.optim.Muon``; modifies the gradient in place."""
        state = self.state[tensor]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(tensor)
        assert tensor.grad is not None
        momentum = state["momentum_buffer"].lerp_(tensor.grad, 1 - self._momentum)
        update = tensor.grad.lerp_(momentum, self._momentum) if self._nesterov else momentum.clone()
        self._orthogonalize(tensor, update)
        tensor.mul_(1 - rate * weight_decay).add_(update, alpha=-rate)

    def _orthogonalize(self, tensor: Tensor, update: Tensor) -> None:
        """Orthogonalize each matrix of ``update``, which has the layout of ``tensor``, in place."""
        if tensor not in self._matrices:
            assert self._device is None or update.ndim == 2, "bind() got no matrices of a flat tensor"
            if update.ndim == 2:
                update.copy_(self._orthogonalized(update))
            return
        moved, flat = update.to(self._device), update.to(self._device).view(-1)
        split = []
        for matrix in self._matrices[tensor]:
            if len(matrix.shards) > 1:
                split.append(matrix)
            elif (shard := matrix.shards[0]).rank == _rank():
                whole = flat.narrow(0, shard.offset, shard.numel).view(matrix.shape)
                whole.copy_(self._orthogonalized(whole))
        world_size = dist.get_world_size() if split else 1
        for first in range(0, len(split), world_size):
            self._exchange(flat, split[first : first + world_size])
        update.copy_(moved)

    def _exchange(self, flat: Tensor, matrices: Sequence[Matrix]) -> None:
        """Orthogonalize at most one split matrix per rank: each rank collects the shards of its matrix, and sends
        the results back."""
        rank, world_size = _rank(), dist.get_world_size()
        shards = [matrix.of_rank(rank) for matrix in matrices]
        sizes = [shard.numel for shard in shards] + [0] * (world_size - len(matrices))
        parts = [flat.narrow(0, shard.offset, shard.numel) for shard in shards]
        sizes_here = [0] * world_size
        if rank < len(matrices):
            sizes_here = [matrices[rank].of_rank(other).numel for other in range(world_size)]
        sent, collected = torch.cat(parts), flat.new_empty(sum(sizes_here))
        dist.all_to_all_single(collected, sent, sizes_here, sizes)
        if rank < len(matrices):
            collected = self._orthogonalized(collected.view(matrices[rank].shape)).flatten()
        dist.all_to_all_single(sent, collected, sizes, sizes_here)
        for part, result in zip(parts, sent.split(sizes[: len(parts)]), strict=True):
            part.copy_(result)

    def _orthogonalized(self, matrix: Tensor) -> Tensor:
        """The update of ``torch.optim.Muon`` without momentum, for the gradient ``matrix`` and a learning rate of 1."""
        scratch = nn.Parameter(torch.zeros_like(matrix))
        scratch.grad = matrix
        torch.optim.Muon(
            [scratch],
            lr=1.0,
            weight_decay=0.0,
            momentum=0.0,
            nesterov=False,
            **self._newton_schulz,  # type: ignore[arg-type]
        ).step()
        return scratch.detach().neg_()


def step_bytes(largest: int) -> int:
    """Temporary bytes of a step whose largest matrix has ``largest`` elements: in float32 the matrix and two copies, in
    bfloat16 two iterates and two square matrices of at most the same size."""
    return largest * (3 * 4 + 4 * 2)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
