"""The trained weights: gathered from the ranks, and exported for plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vtprune_train.training.distributed import rank


def full_state_dict(engine: Any) -> dict[str, torch.Tensor] | None:
    """All weights on rank 0, gathered over ranks under ZeRO-3 one parameter at a time; ``None`` on other ranks."""
    import deepspeed

    module = engine.module
    if engine.zero_optimization_stage() < 3:
        return module.state_dict() if rank() == 0 else None
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            if rank() == 0:
                weights[name] = parameter.data.detach().cpu().clone()
    if rank():
        return None
    persistent = set(module.state_dict())
    weights.update({name: b.detach().cpu().clone() for name, b in module.named_buffers() if name in persistent})
    return weights


def write_export(module: Any, processor: Any, weights: dict[str, torch.Tensor] | None, folder: Path) -> None:
    """Write the folder that ``from_pretrained`` of plain transformers opens; rank 0 alone calls this.

    Args:
        module: the model (its config, with the pruning settings, goes along).
        processor: saved beside it.
        weights: from :func:`full_state_dict`.
        folder: made here.
    """
    module.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)
