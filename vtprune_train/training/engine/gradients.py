"""Measure or discard the accumulated gradients of a step, wherever DeepSpeed keeps them.

To be called between the last backward pass of a step and the optimizer step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def squared_norm(engine: Any, world_size: int) -> Tensor:
    """This rank's share of the squared gradient norm; the sum over ranks is the squared norm, including the loss scale.
    It is not finite if any gradient has a NaN or infinity.

    Reads only the gradients that this rank keeps: its partition under ZeRO, otherwise all.

    Returns:
        [] float64 on the gradients' device.
    """
    optimizer = engine.optimizer
    if getattr(optimizer, "norm_for_param_grads", None):  # offloaded: computed by DeepSpeed before the copy to the host
        norms_of_params = [torch.as_tensor(norm).double() for norm in optimizer.norm_for_param_grads.values()]
        return torch.stack(norms_of_params).square().sum()
    replicas = 1
    if hasattr(optimizer, "averaged_gradients"):  # ZeRO 1, 2, 3: this rank's partition
        grads = [piece for pieces in optimizer.averaged_gradients.values() if pieces is not None for piece in pieces]
    else:  # whole gradients, equal on all ranks
        replicas = world_size
        grads = getattr(optimizer, "fp32_groups_gradients_flat", None) or [
            parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None
        ]
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=engine.device)
    norms = torch._foreach_norm(grads, 2, torch.float32)  # a float16 norm could overflow
    return torch.stack(norms).double().square().sum() / replicas


def discard(engine: Any) -> None:
    """Discard the gradients accumulated since the last optimizer step; the next backward pass starts from zero.
    Parameters, optimizer states and the loss scale are not changed.

    Same as DeepSpeed's handling of an overflow, but without lowering the loss scale.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer

    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer._pre_step()  # resets the micro-step counters
        optimizer._overflow_clean_up(optimizer.loss_scale)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        optimizer.zero_grad(set_to_none=True)
        if optimizer.cpu_offload:
            optimizer._offload_accumulated_param_ids = set()
            optimizer.reset_cpu_buffers()
        else:
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = None
                optimizer.all_grad_tensors[group] = None
    else:
        optimizer.zero_grad(set_to_none=True)
