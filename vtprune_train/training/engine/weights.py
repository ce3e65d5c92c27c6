"""The trained weights: gathered from the ranks, and exported for plain transformers or, of an adapter, for PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vtprune_train.models.io.peft import adapted_of, write_adapter
from vtprune_train.training.distributed import rank
from vtprune_train.training.engine.engine import Engine


def holds_only_trained(module: Any) -> bool:
    """Whether checkpoints of this model leave out what is frozen: it is in the base that an adapter names."""
    return adapted_of(module) is not None


def full_state_dict(engine: Engine) -> dict[str, torch.Tensor] | None:
    """What is exported, on rank 0, gathered over ranks under ZeRO-3 one parameter at a time; ``None`` on other ranks.

    All weights, or the trained ones where :func:`holds_only_trained`.
    """
    import deepspeed

    module = engine.module
    only_trained = holds_only_trained(module)
    if engine.zero_stage < 3:
        if rank():
            return None
        if only_trained:
            return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        return module.state_dict()
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if only_trained and not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter]):
            if rank() == 0:
                weights[name] = parameter.data.detach().cpu().clone()
    if rank():
        return None
    if only_trained:
        return weights
    persistent = set(module.state_dict())
    weights.update({name: b.detach().cpu().clone() for name, b in module.named_buffers() if name in persistent})
    return weights


def write_export(module: Any, processor: Any, weights: dict[str, torch.Tensor] | None, folder: Path) -> None:
    """Write the folder that ``from_pretrained`` of plain transformers opens, or for an adapter that of
    :func:`~vtprune_train.models.io.peft.write_adapter`; rank 0 alone calls this.

    Args:
        module: the model (its config, with the pruning settings, goes along).
        processor: saved beside it.
        weights: from :func:`full_state_dict`.
        folder: made here.
    """
    if holds_only_trained(module):
        assert weights is not None
        write_adapter(module, processor, weights, folder)
        return
    module.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)
