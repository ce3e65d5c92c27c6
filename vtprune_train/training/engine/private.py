"""Every name of DeepSpeed that is read here and that its documentation does not promise, with what it serves for.

They were the same in DeepSpeed 0.19.7 and 0.19.8. :func:`check` looks at each when an engine starts, and
``tests/training/engine`` at those of every ZeRO stage and dtype, so that a release without one is refused by name.
Names in DeepSpeed's files are in :mod:`files`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

import torch

from vtprune_train.config.errors import ConfigError

PINNED = "deepspeed>=0.19.7,<0.20"

ENGINE = {
    "checkpoint_engine.save": "state: what DeepSpeed would write is copied to the host instead",
    "_copy_recovery_script": "state: a script that is not written beside the files",
    "global_steps": "reshard: counters of the checkpoint",
    "global_samples": "reshard: counters of the checkpoint",
    "skipped_steps": "reshard: counters of the checkpoint",
}
ZERO = {
    "optimizer": "reshard: the optimizer inside, which has the states",
    "averaged_gradients": "gradients: of this rank's partition, by group",
    "loss_scaler.dynamic": "gradients, reshard, state: whether float16's loss scale falls by itself",
    "loss_scaler.cur_scale": "gradients, reshard, state: what it is",
}
# By the class of ``engine.optimizer`` (or of one that it derives from).
OPTIMIZERS = {
    "DeepSpeedZeroOptimizer": {
        **ZERO,
        "bit16_groups": "layout: parameters, by group",
        "single_partition_of_fp32_groups": "layout: float32 weights of this rank, by group",
        "micro_step_id": "gradients: set back when gradients are thrown away",
        "all_grad_tensors": "gradients: thrown away",
        "cpu_offload": "gradients: whether states are in host memory",
        "reset_cpu_buffers": "gradients: thrown away where states are in host memory",
    },
    "DeepSpeedZeroOptimizer_Stage3": {
        **ZERO,
        "fp16_groups": "layout: parameters, by group",
        "dp_process_group": "layout: whose ranks share the parameters",
        "fp32_partitioned_groups_flat": "layout, reshard: float32 weights of this rank, by group",
        "fp16_partitioned_groups_flat": "reshard: weights of the forward pass of this rank, by group",
        "fp16_partitioned_groups": "reshard: the same, by parameter",
        "unflatten": "reshard: cuts the one into the other",
        "checkpoint_event_prologue": "reshard: swaps in what is on NVMe",
        "checkpoint_event_epilogue": "reshard: swaps it out",
        "swap_optimizer": "reshard: whether states are on NVMe",
        "offload_optimizer": "gradients: whether states are in host memory",
        "persistent_parameters": "reshard: parameters that every rank keeps whole",
        "_pre_step": "gradients: sets micro-steps back when gradients are thrown away",
        "_overflow_clean_up": "gradients: throws them away",
    },
    "BF16_Optimizer": {
        "optimizer": ZERO["optimizer"],
        "bf16_groups": "layout: parameters, by group",
        "fp32_groups_flat_partition": "layout: float32 weights of this rank, by group",
        "fp32_groups_gradients_flat": "gradients: in float32, by group",
    },
    "FP16_UnfusedOptimizer": {
        "optimizer": ZERO["optimizer"],
        "fp16_groups": "layout: parameters, by group",
        "fp32_groups": "layout: float32 weights, by group",
    },
}
OFFLOADED = {  # where states are in host memory
    "DeepSpeedZeroOptimizer": ("norm_for_param_grads", "_offload_accumulated_param_ids"),
    "DeepSpeedZeroOptimizer_Stage3": ("norm_for_param_grads",),
}
DYNAMIC = {"min_scale": "gradients: what float16's loss scale falls to"}  # of a loss scaler that is dynamic
# Of each trained parameter.
PARAMETERS: dict[str, dict[str, str]] = {
    "DeepSpeedZeroOptimizer": {"_hp_mapping": "layout: where this rank keeps some of it"},
    "BF16_Optimizer": {"_hp_mapping": "layout: where this rank keeps some of it"},
    "DeepSpeedZeroOptimizer_Stage3": {
        "ds_id": "sharded: whether a parameter is partitioned, and the order in which gradients are summed",
        "convert_to_zero_parameters": "sharded: partitions other parameters likewise",
        "ds_numel": "layout: of the whole parameter",
        "ds_tensor": "layout: this rank's partition",
        "partition_numel": "layout: the size of a rank's partition",
    },
}
MODULES = {
    "deepspeed.runtime.zero.stage_1_and_2": ("INITIAL_MICRO_STEP_ID", "DeepSpeedZeroOptimizer"),
    "deepspeed.runtime.zero.stage3": ("DeepSpeedZeroOptimizer_Stage3",),
}


def check_release() -> None:
    """Raise a ``ConfigError`` if this DeepSpeed lacks a class that is named here, before it starts an engine."""
    read = [(name, import_module(name), names) for name, names in MODULES.items()]
    _refuse(f"{module}.{name}" for module, thing, names in read for name in names if not _has(thing, name))


def check(engine: Any) -> None:
    """Raise a ``ConfigError`` if a new DeepSpeed engine lacks a name that is read of it."""
    _refuse(f"{owner}.{name}" for owner, thing, names in _read(engine) for name in names if not _has(thing, name))


def optimizer_kind(optimizer: Any) -> str | None:
    """The class in ``OPTIMIZERS`` that an engine's optimizer is of; ``None`` for PyTorch's, which is read by its
    documented names alone.

    Raises:
        ConfigError: it is of another class, whose gradients and states are somewhere else.
    """
    kind = next((cls.__name__ for cls in type(optimizer).__mro__ if cls.__name__ in OPTIMIZERS), None)
    if kind is None and not isinstance(optimizer, torch.optim.Optimizer):
        _refuse([f"optimizer that training knows (it made a {type(optimizer).__name__})"])
    return kind


def _read(engine: Any) -> Iterator[tuple[str, Any, Iterable[str]]]:
    """A name for each thing that is read, the thing, and the names of its attributes."""
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
            f"DeepSpeed {deepspeed.__version__} has no {', '.join(names)}, which training reads; install {PINNED}"
        )
