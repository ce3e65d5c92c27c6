"""The undocumented names of DeepSpeed that this package uses, and what for.

They are the same in DeepSpeed 0.19.7 and 0.19.8. When an engine starts, :func:`check` raises an error that names
missing ones; ``tests/training/engine`` covers every ZeRO stage and dtype. Names in DeepSpeed's files are in
:mod:`files`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

import torch

from vtprune_train.config.errors import ConfigError

PINNED = "deepspeed>=0.19.7,<0.20"

ENGINE = {
    "checkpoint_engine.save": "state: replaced, to copy to the host what DeepSpeed would write",
    "_copy_recovery_script": "state: replaced, to not write a script",
    "global_steps": "reshard: counter restored from the checkpoint",
    "global_samples": "reshard: counter restored from the checkpoint",
    "skipped_steps": "reshard: counter restored from the checkpoint",
}
ZERO = {
    "optimizer": "engine, reshard: the wrapped optimizer, which has the states",
    "averaged_gradients": "gradients: gradients of this rank's partition, by group",
    "loss_scaler.dynamic": "gradients, reshard, state: whether float16's loss scale is dynamic",
    "loss_scaler.cur_scale": "gradients, reshard, state: the loss scale",
}
# By the class of ``engine.optimizer`` or a base class of it.
OPTIMIZERS = {
    "DeepSpeedZeroOptimizer": {
        **ZERO,
        "bit16_groups": "layout: parameters, by group",
        "single_partition_of_fp32_groups": "layout: float32 weights of this rank, by group",
        "micro_step_id": "gradients: reset when gradients are discarded",
        "all_grad_tensors": "gradients: discarded",
        "cpu_offload": "gradients: whether states are offloaded",
        "reset_cpu_buffers": "gradients: discarded where states are offloaded",
    },
    "DeepSpeedZeroOptimizer_Stage3": {
        **ZERO,
        "fp16_groups": "layout: parameters, by group",
        "dp_process_group": "layout: the ranks that share the parameters",
        "fp32_partitioned_groups_flat": "layout, reshard: float32 weights of this rank, by group",
        "fp16_partitioned_groups_flat": "reshard: this rank's weights in the dtype of the forward pass, by group",
        "fp16_partitioned_groups": "reshard: the same weights, by parameter",
        "unflatten": "reshard: splits fp16_partitioned_groups_flat by parameter",
        "checkpoint_event_prologue": "reshard: swaps in states on NVMe",
        "checkpoint_event_epilogue": "reshard: swaps them out",
        "swap_optimizer": "reshard: whether states are on NVMe",
        "offload_optimizer": "gradients: whether states are offloaded",
        "persistent_parameters": "reshard: parameters that are not partitioned",
        "_pre_step": "gradients: resets micro-steps when gradients are discarded",
        "_overflow_clean_up": "gradients: discards them",
    },
    "BF16_Optimizer": {
        "optimizer": ZERO["optimizer"],
        "bf16_groups": "layout: parameters, by group",
        "fp32_groups_flat_partition": "layout: float32 weights of this rank, by group",
        "fp32_groups_gradients_flat": "gradients: float32 gradients, by group",
    },
    "FP16_UnfusedOptimizer": {
        "optimizer": ZERO["optimizer"],
        "fp16_groups": "layout: parameters, by group",
        "fp32_groups": "layout: float32 weights, by group",
    },
}
OFFLOADED = {  # if states are in host memory
    "DeepSpeedZeroOptimizer": ("norm_for_param_grads", "_offload_accumulated_param_ids"),
    "DeepSpeedZeroOptimizer_Stage3": ("norm_for_param_grads",),
}
DYNAMIC = {"min_scale": "engine: smallest loss scale of float16"}  # of a dynamic loss scaler
# Attributes of each trained parameter.
PARAMETERS: dict[str, dict[str, str]] = {
    "DeepSpeedZeroOptimizer": {"_hp_mapping": "layout: where this rank keeps its part"},
    "BF16_Optimizer": {"_hp_mapping": "layout: where this rank keeps its part"},
    "DeepSpeedZeroOptimizer_Stage3": {
        "ds_id": "sharded: whether a parameter is partitioned, and the order in which gradients are summed",
        "convert_to_zero_parameters": "sharded: partitions other parameters in the same way",
        "ds_numel": "layout: elements of the whole parameter",
        "ds_tensor": "layout: this rank's partition",
        "partition_numel": "layout: the size of a rank's partition",
    },
}
MODULES = {
    "deepspeed.runtime.zero.stage_1_and_2": ("INITIAL_MICRO_STEP_ID", "DeepSpeedZeroOptimizer"),
    "deepspeed.runtime.zero.stage3": ("DeepSpeedZeroOptimizer_Stage3",),
}


def check_release() -> None:
    """Raise a ``ConfigError`` if this DeepSpeed lacks a class listed here; called before an engine starts."""
    read = [(name, import_module(name), names) for name, names in MODULES.items()]
    _refuse(f"{module}.{name}" for module, thing, names in read for name in names if not _has(thing, name))


def check(engine: Any) -> None:
    """Raise a ``ConfigError`` if a new DeepSpeed engine lacks an attribute listed here."""
    _refuse(f"{owner}.{name}" for owner, thing, names in _read(engine) for name in names if not _has(thing, name))


def optimizer_kind(optimizer: Any) -> str | None:
    """The class in ``OPTIMIZERS`` of an engine's optimizer; ``None`` for PyTorch's optimizers, of which only documented
    names are used.

    Raises:
        ConfigError: the class is unknown, so its gradients and states cannot be found.
    """
    kind = next((cls.__name__ for cls in type(optimizer).__mro__ if cls.__name__ in OPTIMIZERS), None)
    if kind is None and not isinstance(optimizer, torch.optim.Optimizer):
        _refuse([f"optimizer that training supports (it created a {type(optimizer).__name__})"])
    return kind


def _read(engine: Any) -> Iterator[tuple[str, Any, Iterable[str]]]:
    """Yields (name for messages, object, attributes that are used)."""
    yield "DeepSpeedEngine", engine, ENGINE
    kind = optimizer_kind(engine.optimizer)
    if kind is None:
        return
    yield kind, engine.optimizer, OPTIMIZERS[kind]
    if getattr(engine.optimizer, "cpu_offload", False) or getattr(engine.optimizer, "offload_optimizer", False):
        yield kind, engine.optimizer, OFFLOADED[kind]
    if getattr(scaler := getattr(engine.optimizer, "loss_scaler", None), "dynamic", False):
        yield "DynamicLossScaler", scaler, DYNAMIC
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            yield "parameter", parameter, PARAMETERS.get(kind, ())


def _has(thing: Any, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(thing, name):
            return False
        thing = getattr(thing, name)
    return True


def _refuse(missing: Iterable[str]) -> None:
    import deepspeed

    if names := list(dict.fromkeys(missing)):
        raise ConfigError(
            f"DeepSpeed {deepspeed.__version__} has no {', '.join(names)}, which training needs; install {PINNED}"
        )
