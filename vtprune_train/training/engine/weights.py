"""The trained weights: exported for plain transformers or, of an adapter, for PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vtprune_train.models.io.export import Plan, plan_of, write_weights
from vtprune_train.models.io.peft import adapted_of, adapter_plan, write_adapter_settings
from vtprune_train.training.distributed import rank
from vtprune_train.training.engine.engine import Engine


def holds_only_trained(module: Any) -> bool:
    """Whether checkpoints of this model leave out what is frozen: it is in the base that an adapter names."""
    return adapted_of(module) is not None


def full_state_dict(engine: Engine) -> dict[str, torch.Tensor] | None:
    """What is exported, on rank 0; ``None`` on other ranks, and under ZeRO-3, where no rank has it.

    All weights, or the trained ones where :func:`holds_only_trained`.
    """
    module = engine.module
    if rank() or engine.zero_stage == 3:
        return None
    if holds_only_trained(module):
        return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    return module.state_dict()


def export_plan(module: Any) -> Plan:
    """Which tensors stand in which file of the model's export."""
    return adapter_plan(module) if holds_only_trained(module) else plan_of(module)


def write_export(module: Any, processor: Any, weights: dict[str, torch.Tensor] | None, folder: Path) -> None:
    """Write the folder that ``from_pretrained`` of plain transformers opens (its config has the pruning settings), or
    for an adapter that of :func:`~vtprune_train.models.io.peft.write_adapter_settings`; rank 0 alone calls this.
    Without ``weights``, those of :func:`full_state_dict`, all else is written."""
    if holds_only_trained(module):
        write_adapter_settings(module, folder)
    else:
        module.save_pretrained(folder, state_dict={})
    processor.save_pretrained(folder)
    if weights is not None:
        write_weights(export_plan(module), folder, lambda stored: weights[stored.name])
