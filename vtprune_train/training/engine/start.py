"""DeepSpeed: starting the process group, and the engine around a model."""

from __future__ import annotations

import difflib
import os
import socket
from datetime import timedelta
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from vtprune_train.config.settings import Config, ConfigError
from vtprune_train.models.io.placement import note_shapes
from vtprune_train.training.engine.monitors import optional_monitors
from vtprune_train.training.engine.sharded import complete

# What the loop sets itself; a DeepSpeed JSON that sets one of these otherwise would be silently overruled.
OWN_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "data.max_tokens",
    "gradient_accumulation_steps": "data.max_tokens",
    "gradient_clipping": "train.clip",
    "optimizer": "model.train",
    "scheduler": "train.schedule",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
}
# Keys of a DeepSpeed JSON whose typos are worth finding.
OFTEN_SET = (
    *OWN_KEYS, "zero_optimization", "activation_checkpointing", "data_types", "communication_data_type", "tensorboard",
    "wall_clock_breakdown", "flops_profiler", "comms_logger", "steps_per_print", "zero_force_ds_cpu_optimizer",
    "zero_allow_untested_optimizer", "prescale_gradients", "gradient_predivide_factor", "aio",
)  # fmt: skip


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
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update(alone)
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
    """Make sure that this device can train in ``model.dtype``, and that DeepSpeed takes ``settings``.

    Raises:
        ConfigError: names the key, its value and what fits.
    """
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


def engine_config(config: Config) -> dict[str, Any]:
    """The DeepSpeed JSON with what the run's settings decide filled in.

    Raises:
        ConfigError: the JSON sets a key that belongs to the run's settings.
    """
    settings = config.deepspeed_config()
    if not isinstance(zero := settings.get("zero_optimization", {}), dict) or not isinstance(zero.get("stage", 0), int):
        raise ConfigError(f"deepspeed.zero_optimization={zero!r}: it takes keys, for example {{stage: 2}}")
    wrong = [f"deepspeed: {key} is decided by {ours}; take it out" for key, ours in OWN_KEYS.items() if key in settings]
    for key in settings:  # DeepSpeed passes over keys that it does not know
        nearest = difflib.get_close_matches(key, OFTEN_SET, n=1, cutoff=0.85)
        if nearest and key not in OFTEN_SET:
            wrong.append(f"deepspeed.{key}: unknown key; did you mean {nearest[0]}?")
    if config.model.dtype == "float16" and not zero_stage(settings):
        wrong.append("model.dtype=float16 needs ZeRO 1 or more (DeepSpeed scales no loss at stage 0); use zero2.json")
    if config.model.peft is not None and config.model.peft.kind == "qlora" and zero_stage(settings) == 3:
        wrong.append("model.peft.kind=qlora: 4-bit weights cannot be partitioned by ZeRO-3; use zero2.json")
    if config.model.fp8 and zero_stage(settings) == 3:
        wrong.append(
            "model.fp8=true keeps whole weights for the backward pass, which ZeRO-3 would share out; use zero2.json"
        )
    if wrong:
        raise ConfigError("\n".join(wrong))
    settings = _without_second_norm(settings, config)
    return {
        "steps_per_print": 2**62,
        "zero_force_ds_cpu_optimizer": False,
        "tensorboard": {"enabled": True, "output_path": str(config.run_dir), "job_name": "tensorboard"},
        **settings,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.clip,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "fp16": {"enabled": config.model.dtype == "float16"},
    }


def _without_second_norm(settings: dict[str, Any], config: Config) -> dict[str, Any]:
    """Keep DeepSpeed from computing a gradient norm in float64 beside the loop's own, where it has no use for it: it
    clips by it, and the ZeRO-1 optimizer that accumulates bfloat16 gradients in float32 cannot go without."""
    zero = settings.get("zero_optimization", {})
    accumulates_fp32 = settings.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    needed = config.train.clip or offloads_optimizer(settings) or config.model.dtype == "float16"
    if needed or zero_stage(settings) not in (1, 2) or (zero_stage(settings) == 1 and accumulates_fp32):
        return settings
    return {**settings, "zero_optimization": {"compute_grad_norm": False, **zero}}


def offloads_optimizer(settings: dict[str, Any]) -> bool:
    """Whether optimizer states live in host memory."""
    offload = settings.get("zero_optimization", {}).get("offload_optimizer", {})
    return offload.get("device", "none") != "none"


def zero_stage(settings: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed config."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def precision(engine: Any) -> str:
    """The dtype an engine computes in, as ``model.dtype`` names it."""
    if engine.bfloat16_enabled():
        return "bfloat16"
    return "float16" if engine.fp16_enabled() else "float32"


def start_engine(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    """A ``DeepSpeedEngine`` around ``model``, whose buffers keep their dtypes.

    Raises:
        ConfigError: DeepSpeed cast a buffer, such as the rotary frequencies, to half precision.
    """
    import deepspeed

    note_shapes(model)
    complete(model)
    before = {name: buffer.dtype for name, buffer in model.named_buffers()}
    with optional_monitors():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    for name, buffer in engine.module.named_buffers():
        if buffer.dtype != before[name]:
            raise ConfigError(
                f"DeepSpeed {deepspeed.__version__} cast the buffer {name} from {before[name]} to {buffer.dtype}; "
                "rotary positions need all their digits. Leave data_types.buffer_dtype out of the DeepSpeed JSON, or "
                "install the DeepSpeed of requirements.txt"
            )
    return engine
