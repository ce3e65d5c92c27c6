"""The DeepSpeed config: keys derived from the run's settings, and keys that users must not set."""

from __future__ import annotations

import difflib
from typing import Any

from vtprune_train.config.errors import ConfigError
from vtprune_train.config.settings import Config

# Keys derived from these settings. A DeepSpeed JSON must not set them, because they would be ignored.
DERIVED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "data.max_tokens",
    "gradient_accumulation_steps": "data.max_tokens",
    "gradient_clipping": "train.clip",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "tensorboard": "train.trackers",
    "wandb": "train.trackers",
    "comet": "train.trackers",
    "csv_monitor": "train.trackers",
}
# Common keys of a DeepSpeed JSON, for finding typos.
OFTEN_SET = (
    *DERIVED_KEYS, "zero_optimization", "activation_checkpointing", "data_types", "communication_data_type",
    "wall_clock_breakdown", "flops_profiler", "comms_logger", "steps_per_print", "zero_force_ds_cpu_optimizer",
    "zero_allow_untested_optimizer", "prescale_gradients", "gradient_predivide_factor", "aio",
)  # fmt: skip


def engine_config(config: Config) -> dict[str, Any]:
    """The DeepSpeed config of a run: its JSON and the keys derived from its settings.

    Raises:
        ConfigError: the JSON sets a derived key or has an unknown one, or the settings do not work with its ZeRO stage.
    """
    settings = config.deepspeed_config()
    if not isinstance(zero := settings.get("zero_optimization", {}), dict) or not isinstance(zero.get("stage", 0), int):
        raise ConfigError(f"deepspeed.zero_optimization={zero!r}: must be a mapping, for example {{stage: 2}}")
    wrong = [
        f"deepspeed.{key} is set by {setting}; remove it from the JSON"
        for key, setting in DERIVED_KEYS.items()
        if key in settings
    ]
    for key in settings:  # DeepSpeed ignores unknown keys
        nearest = difflib.get_close_matches(key, OFTEN_SET, n=1, cutoff=0.85)
        if nearest and key not in OFTEN_SET:
            wrong.append(f"deepspeed.{key}: unknown key; did you mean {nearest[0]}?")
    if config.model.dtype == "float16" and not zero_stage(settings):
        wrong.append("model.dtype=float16 needs ZeRO 1 or higher (stage 0 has no loss scaling); use zero2.json")
    if config.model.peft is not None and config.model.peft.kind == "qlora" and zero_stage(settings) == 3:
        wrong.append("model.peft.kind=qlora: 4-bit weights cannot be partitioned by ZeRO-3; use zero2.json")
    if config.model.fp8 and zero_stage(settings) == 3:
        wrong.append(
            "model.fp8=true saves whole weights for the backward pass, but ZeRO-3 partitions them; use zero2.json"
        )
    if wrong:
        raise ConfigError("\n".join(wrong))
    settings = _without_second_norm(settings, config)
    return {
        "steps_per_print": 2**62,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        **settings,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.clip,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "fp16": {"enabled": config.model.dtype == "float16"},
    }


def _without_second_norm(settings: dict[str, Any], config: Config) -> dict[str, Any]:
    """Disable DeepSpeed's own gradient norm (in float64) where it is not needed: the loop computes one. Clipping needs
    it, and so does the ZeRO-1 optimizer that accumulates bfloat16 gradients in float32."""
    zero = settings.get("zero_optimization", {})
    accumulates_fp32 = settings.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    needed = config.train.clip or offloads_optimizer(settings) or config.model.dtype == "float16"
    if needed or zero_stage(settings) not in (1, 2) or (zero_stage(settings) == 1 and accumulates_fp32):
        return settings
    return {**settings, "zero_optimization": {"compute_grad_norm": False, **zero}}


def offloads_optimizer(settings: dict[str, Any]) -> bool:
    """Whether optimizer states are offloaded to host memory."""
    offload = settings.get("zero_optimization", {}).get("offload_optimizer", {})
    return offload.get("device", "none") != "none"


def zero_stage(settings: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed config."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))
