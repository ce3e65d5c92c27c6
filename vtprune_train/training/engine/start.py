"""Start the process group and a DeepSpeed engine."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from vtprune_train.config.errors import ConfigError
from vtprune_train.config.settings import Config
from vtprune_train.config.train import TrainConfig
from vtprune_train.core import user_code
from vtprune_train.models.io.placement import note_shapes
from vtprune_train.training.distributed import rank
from vtprune_train.training.engine import private
from vtprune_train.training.engine.engine import Engine
from vtprune_train.training.engine.settings import offloads_optimizer, zero_stage
from vtprune_train.training.engine.sharded import complete
from vtprune_train.training.optimizer import OptimizerSpec, bytes_per_element

log = logging.getLogger(__name__)


def start_distributed(timeout: float) -> torch.device:
    """Join the launcher's process group, or create one with a single process. Returns this rank's device. A collective
    that takes longer than ``timeout`` seconds is an error."""
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
            # Ranks share the machine's cores: more threads than cores would slow all of them down.
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))))
        # The shared-memory all-reduce is only used for inference. DeepSpeed would compile it at the first start, and a
        # process killed meanwhile would leave a lock that blocks all later starts.
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
        lines = [f"deepspeed.zero_optimization.{key}: {message} (got {value!r})" for key, message, value in wrong]
        raise ConfigError("\n".join(lines)) from error
    dtype, accelerator = config.model.dtype, get_accelerator()
    can = {"float16": accelerator.is_fp16_supported, "bfloat16": accelerator.is_bf16_supported}
    if dtype in can and not can[dtype]():
        other = next((name for name in ("bfloat16", "float16") if name != dtype and can[name]()), "float32")
        where = "this CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
        raise ConfigError(f"model.dtype={dtype} is not supported on {where}; use model.dtype={other} or float32")


def check_optimizer(train: TrainConfig, settings: dict[str, Any], device: torch.device) -> OptimizerSpec:
    """Check the optimizer of a run for this device and these DeepSpeed ``settings``. Returns DeepSpeed's AdamW if the
    states of AdamW are offloaded from a GPU.

    Raises:
        ConfigError: the optimizer is not available (see :meth:`OptimizerSpec.of`), or does not work there.
    """
    place, stage, offloads = f"train.optimizer={train.optimizer}", zero_stage(settings), offloads_optimizer(settings)
    if train.optimizer == "adamw_8bit" and (device.type != "cuda" or offloads):
        where = "DeepSpeed keeps them in host memory" if device.type == "cuda" else "there is no CUDA device here"
        raise ConfigError(f"{place} keeps its states on a GPU, but {where}; use train.optimizer=adamw")
    spec = OptimizerSpec.of(train)
    if stage and issubclass(spec.cls, torch.optim.Adagrad):
        raise ConfigError(
            f"{place}: under ZeRO {stage} DeepSpeed rebuilds Adagrad without its parameter groups; use "
            "deepspeed=configs/deepspeed/zero0.json"
        )
    of_vector = spec.states({}, ndim=1, device="cpu" if offloads else device)  # raises if it cannot step
    if stage and rank() == 0 and user_code.is_path(train.optimizer):
        try:
            of_matrix = spec.states({}, ndim=2, device="cpu" if offloads else device)
        except ConfigError as error:  # no matrix occurs under this stage, and the other ranks continue
            log.warning("%s; under ZeRO %d it gets only flat tensors", error, stage)
        else:
            if bytes_per_element(of_vector) != bytes_per_element(of_matrix):
                log.warning(
                    "%s treats matrices differently from vectors, but under ZeRO %d it gets only flat tensors; to keep "
                    "parameters whole, use deepspeed=configs/deepspeed/zero0.json", place, stage,
                )  # fmt: skip
    if train.optimizer == "adamw" and offloads and device.type == "cuda":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        arguments = {key: value for key, value in spec.arguments.items() if key != "fused"}
        spec = OptimizerSpec(spec.name, DeepSpeedCPUAdam, arguments)
    return spec


def start_engine(
    model: nn.Module, groups: Sequence[dict[str, Any]], spec: OptimizerSpec, settings: dict[str, Any]
) -> Engine:
    """Create a DeepSpeed engine that trains the parameter ``groups`` of ``model`` with the optimizer ``spec``. Buffers
    keep their dtypes.

    Raises:
        ConfigError: the optimizer cannot be built, this DeepSpeed lacks a name that training needs, or DeepSpeed cast a
            buffer, such as the rotary frequencies, to half precision.
    """
    import deepspeed

    private.check_release()
    note_shapes(model)
    complete(model)
    optimizer = spec.build(groups)
    before = {name: buffer.dtype for name, buffer in model.named_buffers()}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    for name, buffer in engine.module.named_buffers():
        if buffer.dtype != before[name]:
            raise ConfigError(
                f"DeepSpeed {deepspeed.__version__} cast the buffer {name} from {before[name]} to {buffer.dtype}; "
                "rotary positions need full precision. Remove data_types.buffer_dtype from the DeepSpeed JSON, or "
                "install the DeepSpeed version in requirements.txt"
            )
    private.check(engine)
    return Engine(engine, spec, groups)
