"""DeepSpeed: starting the process group, and the engine around a model."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from vtprune_train.config.errors import ConfigError
from vtprune_train.config.settings import Config
from vtprune_train.models.io.placement import note_shapes
from vtprune_train.training.engine import private
from vtprune_train.training.engine.engine import Engine
from vtprune_train.training.engine.sharded import complete


def start_distributed(timeout: float) -> torch.device:
    """Join the process group that a launcher describes, or make one of a single process; returns this rank's device.
    A collective that takes longer than ``timeout`` seconds is an error."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    import deepspeed

    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(port))
    if on_cpu:
        if "OMP_NUM_THREADS" not in os.environ:
            # Ranks share the machine's cores: more threads than cores make each of them wait for the others.
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))))
        # The shared-memory all-reduce serves inference alone. DeepSpeed would compile it at the first start, under a
        # lock that a process killed meanwhile leaves behind, and every later start waits for.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout))
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout))
    return device


def check_engine(config: Config, settings: dict[str, Any], device: torch.device) -> None:
    """Raise a ``ConfigError`` if this device cannot train in ``model.dtype``, or DeepSpeed refuses ``settings``."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**settings.get("zero_optimization", {}))
    except ValidationError as error:
        wrong = [(".".join(map(str, item["loc"])), item["msg"], item["input"]) for item in error.errors()]
        lines = [f"deepspeed.zero_optimization.{key}: {message} (it is {value!r})" for key, message, value in wrong]
        raise ConfigError("\n".join(lines)) from error
    dtype, accelerator = config.model.dtype, get_accelerator()
    can = {"float16": accelerator.is_fp16_supported, "bfloat16": accelerator.is_bf16_supported}
    if dtype in can and not can[dtype]():
        other = next((name for name in ("bfloat16", "float16") if name != dtype and can[name]()), "float32")
        where = "a CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
        raise ConfigError(f"model.dtype={dtype}: {where} cannot train in it; use model.dtype={other} or float32")


def build_optimizer(
    groups: list[dict[str, Any]], betas: tuple[float, float], device: torch.device, offloads: bool
) -> torch.optim.Optimizer:
    """AdamW: PyTorch's fused one, or DeepSpeed's for states that live in host memory beside a GPU."""
    if not offloads or device.type != "cuda":
        return torch.optim.AdamW(groups, betas=betas, fused=True)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(groups, betas=betas)


def start_engine(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Engine:
    """A DeepSpeed engine around ``model``, whose buffers keep their dtypes.

    Raises:
        ConfigError: this DeepSpeed lacks a name that training reads, or cast a buffer, such as the rotary frequencies,
            to half precision.
    """
    import deepspeed

    private.check_release()
    note_shapes(model)
    complete(model)
    before = {name: buffer.dtype for name, buffer in model.named_buffers()}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    for name, buffer in engine.module.named_buffers():
        if buffer.dtype != before[name]:
            raise ConfigError(
                f"DeepSpeed {deepspeed.__version__} cast the buffer {name} from {before[name]} to {buffer.dtype}; "
                "rotary positions need all their digits. Leave data_types.buffer_dtype out of the DeepSpeed JSON, or "
                "install the DeepSpeed of requirements.txt"
            )
    private.check(engine)
    return Engine(engine)
