"""The DeepSpeed JSON: what a run's settings decide of it, and what a user may not set."""

from __future__ import annotations

import difflib
from typing import Any

from vtprune_train.config.errors import ConfigError
from vtprune_train.config.settings import Config

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
    "tensorboard": "train.trackers",
    "wandb": "train.trackers",
    "comet": "train.trackers",
    "csv_monitor": "train.trackers, and metrics.jsonl has every number",
}
# Keys of a DeepSpeed JSON whose typos are worth finding.
OFTEN_SET = (
    *OWN_KEYS, "zero_optimization", "activation_checkpointing", "data_types", "communication_data_type",
    "wall_clock_breakdown", "flops_profiler", "comms_logger", "steps_per_print", "zero_force_ds_cpu_optimizer",
    "zero_allow_untested_optimizer", "prescale_gradients", "gradient_predivide_factor", "aio",
)  # fmt: skip


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
