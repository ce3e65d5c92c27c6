"""Turn pydantic's validation errors into messages: one line per key, with the key that was probably meant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from vtprune_train.config.errors import did_you_mean
from vtprune_train.config.section import Section
from vtprune_train.config.settings import Config

LONGEST_SHOWN = 200  # longest value in a message, in characters
OTHER_LIBRARIES = {  # our setting: its names in other libraries
    "a rate for each trained part: model.train={projector: 1.0e-3, ...}": "learning_rate lr",
    "train.global_batch_size, in samples over all GPUs": "batch_size train_batch_size",
    "data.max_tokens, the tokens of a micro-batch; their number per step follows from train.global_batch_size": (
        "per_device_train_batch_size micro_batch_size gradient_accumulation_steps"
    ),
    "train.epochs": "num_epochs num_train_epochs",
    "train.max_steps": "steps num_steps",
    "train.warmup_ratio, a share of all steps": "warmup_steps",
    "train.clip": "max_grad_norm grad_clip",
    "train.schedule": "lr_scheduler_type scheduler",
    "train.min_rate, a share of the peak rate": "min_lr min_lr_ratio",
    "train.optimizer": "optim optimizer_name",
    "train.activation_checkpointing": "gradient_checkpointing",
    "model.dtype": "bf16 fp16 torch_dtype precision",
    "train.save_every": "save_steps save_interval",
    "train.keep_last": "save_total_limit",
    "train.eval_every": "eval_steps",
    "data.train=[{path: train.json, images: images}]": "data_path train_file dataset",
    "data.train.0.images": "image_folder image_root",
    "model.path": "model_name_or_path model_path",
    "data.max_length": "model_max_length max_seq_length",
    "model.peft.r": "lora_r lora_rank",
    "model.peft.alpha": "lora_alpha",
}
OTHER_NAMES = {name: here for here, names in OTHER_LIBRARIES.items() for name in names.split()}


def explain(error: ValidationError, parents: Sequence[Any] = ()) -> list[str]:
    """One line for each wrong key. ``parents`` is the path of the validated section."""
    lines: dict[str, str] = {}
    for item in error.errors():
        location = [part for part in (*parents, *item["loc"]) if part not in ("str", "dict[str,any]")]
        key = ".".join(str(part) for part in location)
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            line = f"{key}: unknown key{nearest_key(location)}"
        elif item["type"] == "value_error":
            line = f"{key}.{message}" if _names_key(message, location) else f"{key}: {message}" if key else message
        else:
            line = f"{key}: {_type_problem(item, location)}"
        lines.setdefault(key, line)
    return list(lines.values())


def _names_key(message: str, location: Sequence[Any]) -> bool:
    """Whether the message of a section begins with one of its keys: ``key=value ...``."""
    if len(location) != 1 or location[0] not in Config.model_fields:
        return False
    name = message.partition("=")[0]
    # Settings of a pruning method are not fields of the section.
    return name.isidentifier() and (location[0] == "pruning" or name in _known_keys(location))


def _type_problem(item: Any, location: Sequence[Any]) -> str:
    """The message for a value of the wrong type."""
    message, value = item["msg"], item["input"]
    if item["type"] in ("model_type", "dict_type", "model_attributes_type"):
        known = ", ".join(_known_keys(location))
        message = f"it takes keys, not a single value{f'; known: {known}' if known else ''}"
    if item["type"] == "list_type" and isinstance(value, dict | str):
        message += "; write it in brackets, [...], or as lines that begin with '- '"
    if item["type"] == "string_type" and isinstance(value, int | float):
        text = "..." if isinstance(value, bool) else value
        message += f"""; quote the string: '{".".join(map(str, location))}="{text}"'"""
    is_shown = item["type"] != "missing" and len(repr(value)) <= LONGEST_SHOWN
    return f"{message} (it is {value!r})" if is_shown else message


def nearest_key(location: Sequence[Any]) -> str:
    """Suffix of an error about an unknown key: suggests our name for another library's setting, the same key in another
    section, or the nearest key."""
    *parents, name = location
    if name in OTHER_NAMES:
        return f"; use {OTHER_NAMES[name]}"
    if any(isinstance(parent, int) for parent in parents):  # an entry of a list: its keys are also in no other section
        return did_you_mean(str(name), _known_keys(parents), parents)
    elsewhere = [
        f"{section}.{name}"
        for section, field in Config.model_fields.items()
        if _is_section(field.annotation) and name in field.annotation.model_fields  # type: ignore[union-attr]
    ]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    return did_you_mean(str(name), _known_keys(parents), parents)


def _known_keys(location: Sequence[Any]) -> list[str]:
    """The keys of the section at ``location``."""
    section: Any = Config
    for part in location:
        if isinstance(part, int) or not _is_section(section):
            continue
        annotation = section.model_fields[part].annotation
        section = next(filter(_is_section, getattr(annotation, "__args__", ())), annotation)
    return list(section.model_fields) if _is_section(section) else []


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)
