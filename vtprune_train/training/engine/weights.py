"""Exports the trained weights for plain transformers, or an adapter for PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vtprune_train.models.io.export import Plan, plan_of, write_weights
from vtprune_train.models.io.peft import adapted_of, adapter_plan, write_adapter_settings
from vtprune_train.training.distributed import rank
from vtprune_train.training.engine.engine import Engine


def holds_only_trained(module: Any) -> bool:
    """Whether checkpoints of this model leave out frozen parameters, because they are in the base of an adapter."""
    return adapted_of(module) is not None


def full_state_dict(engine: Engine) -> dict[str, torch.Tensor] | None:
    """The weights to export on rank 0: all, or only the trained ones if :func:`holds_only_trained`. ``None`` on other
    ranks, and under ZeRO-3, where no rank has them."""
    module = engine.module
    if rank() or engine.zero_stage == 3:
        return None
    if holds_only_trained(module):
        return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    return module.state_dict()


def export_plan(module: Any) -> Plan:
    """Which tensors go to which file of the model's export."""
    return adapter_plan(module) if holds_only_trained(module) else plan_of(module)


def write_export(module: Any, processor: Any, weights: dict[str, torch.Tensor] | None, folder: Path) -> None:
    """Write an export: a folder that ``from_pretrained`` of plain transformers opens (its config has the pruning
    settings), or the adapter of :func:`~vtprune_train.models.io.peft.write_adapter_settings`. Only rank 0 calls this.

    Args:
        module: the model.
        processor: the model's processor.
        weights: from :func:`full_state_dict`; with ``None``, everything except the weights is written.
        folder: the folder to write.
    """
    if holds_only_trained(module):
        write_adapter_settings(module, folder)
    else:
        module.save_pretrained(folder, state_dict={})
    processor.save_pretrained(folder)
    if weights is not None:
        write_weights(export_plan(module), folder, lambda stored: weights[stored.name])
