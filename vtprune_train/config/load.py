"""A run's settings read: YAML plus ``key=value``, checked as a whole, all errors at once."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from vtprune_train.config.mixture import expand
from vtprune_train.config.settings import (
    TRAINING_ONLY,
    Config,
    ConfigError,
    Section,
    SourceConfig,
    did_you_mean,
    find_file,
)
from vtprune_train.files.parse import parse_value, read_json_object, read_yaml

log = logging.getLogger(__name__)

NOT_SET = "not set"
LONGEST_SHOWN = 200  # characters of a value
OTHER_NAMES = {
    **dict.fromkeys(
        ("learning_rate", "lr"), "a rate for each part that is trained: model.train={projector: 1.0e-3, ...}"
    ),
    **dict.fromkeys(("batch_size", "train_batch_size"), "train.global_batch_size, in samples of all GPUs together"),
    **dict.fromkeys(
        ("per_device_train_batch_size", "micro_batch_size", "gradient_accumulation_steps"),
        "data.max_tokens, the tokens of a micro-batch; train.global_batch_size decides how many a step needs",
    ),
    **dict.fromkeys(("num_epochs", "num_train_epochs"), "train.epochs"),
    **dict.fromkeys(("steps", "num_steps"), "train.max_steps"),
    "warmup_steps": "train.warmup_ratio, a share of all steps",
    **dict.fromkeys(("max_grad_norm", "grad_clip"), "train.clip"),
    **dict.fromkeys(("lr_scheduler_type", "scheduler"), "train.schedule"),
    "gradient_checkpointing": "train.activation_checkpointing",
    **dict.fromkeys(("bf16", "fp16", "torch_dtype", "precision"), "model.dtype"),
    **dict.fromkeys(("save_steps", "save_interval"), "train.save_every"),
    "save_total_limit": "train.keep_last",
    "eval_steps": "train.eval_every",
    **dict.fromkeys(("data_path", "train_file", "dataset"), "data.train=[{path: train.json, images: images}]"),
    **dict.fromkeys(("image_folder", "image_root"), "data.train.0.images"),
    **dict.fromkeys(("model_name_or_path", "model_path"), "model.path"),
    **dict.fromkeys(("model_max_length", "max_seq_length"), "data.max_length"),
    **dict.fromkeys(("lora_r", "lora_rank"), "model.peft.r"),
    "lora_alpha": "model.peft.alpha",
}


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides (dots between nested keys), check everything.

    Args:
        path: a path, or a bare name looked for in the working folder, then in ``configs/``.
        overrides: for example ``train.clip=1.0``; values are YAML.

    Raises:
        ConfigError: with one line for each thing that is wrong.
    """
    file = find_file(path, "--config")
    try:
        tree = read_yaml(file) or {}
    except ValueError as error:
        raise ConfigError(f"--config: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} holds a {type(tree).__name__}, not settings")
    errors = [*_include(tree, file), *_include_pruning(tree, file)]
    _change_method(tree, overrides)
    for override in overrides:
        errors += [message] if (message := _apply(tree, override)) else _include(tree, file)
        errors += _include_pruning(tree, file)
    config, found = _validate(tree)
    if errors or found or config is None:
        raise ConfigError("\n".join(errors + found))
    return config


def _include(tree: dict[str, Any], file: Path) -> list[str]:
    """Put the entries of included mixtures in place of their files; what is wrong with these, if anything."""
    data = tree.get("data")
    errors = []
    for which in ("train", "eval"):
        if isinstance(data, dict) and data.get(which) is not None:
            try:
                data[which] = expand(data[which], f"data.{which}", file.resolve(), find_file, _wrong_source)
            except ValueError as error:
                errors.append(str(error))
                del data[which]
    return errors


def _include_pruning(tree: dict[str, Any], file: Path) -> list[str]:
    """Put the section in place of ``pruning: FILE``, as ``vtprune search`` writes it; what is wrong with it, if
    anything."""
    name = tree.get("pruning")
    if not isinstance(name, str):
        return []
    del tree["pruning"]
    beside = file.resolve().parent / name
    if not Path(name).suffix and not beside.is_file():
        return [f"pruning: {name} is no file; a method is named by pruning.method={name}"]
    try:
        tree["pruning"] = read_pruning(beside if beside.is_file() else find_file(name, "pruning"))
    except ConfigError as error:
        return [str(error)]
    return []


def read_pruning(path: Path) -> dict[str, Any]:
    """The section ``pruning`` of a YAML file.

    Raises:
        ConfigError: there is none.
    """
    try:
        tree = read_yaml(path)
    except ValueError as error:
        raise ConfigError(f"pruning: {error}") from error
    section = tree.get("pruning") if isinstance(tree, dict) else None
    if not isinstance(section, dict):
        raise ConfigError(f"pruning: {path} has no section pruning; it begins with a line 'pruning:'")
    return section


def _change_method(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Where an override names another method than the file, the file's settings of its own method go: they are not
    meant for it. With none they stay, and are warned about."""
    section, prefix = tree.get("pruning"), "pruning.method="
    named = [override.removeprefix(prefix) for override in overrides if override.startswith(prefix)]
    if not named or not isinstance(section, dict) or named[-1] in ("none", section.get("method", "pyramiddrop")):
        return
    left_out = [key for key in section if key not in ("method", *TRAINING_ONLY)]
    for key in left_out:
        del section[key]
    if left_out:
        log.info(
            "pruning.%s of the file belong to %s; pruning.method=%s begins with its own defaults",
            ", ".join(left_out),
            section.get("method", "pyramiddrop"),
            named[-1],
        )


def _wrong_source(entry: Any) -> list[str]:
    """What is wrong with an entry of an included mixture, one line each."""
    try:
        SourceConfig.model_validate(entry)
    except ValidationError as error:
        lines = _explain(error, ("data", "train", 0))
        return [line.replace("data.train.0.", "").removeprefix("data.train.0") for line in lines]
    return []


def _validate(tree: dict[str, Any]) -> tuple[Config | None, list[str]]:
    """The settings, and every error: what is wrong is reported and put back to its default until the rest, checks
    that span several keys included, has been looked at too."""
    errors: list[str] = []
    forgotten: set[str] = set()  # whole sections: what is then said of their absence is not the user's doing
    tree = copy.deepcopy(tree)
    while True:
        try:
            return Config.model_validate(tree), errors
        except ValidationError as error:
            new = [line for line in _explain(error) if line not in errors]
            new = [line for line in new if not any(line.startswith(section) for section in forgotten)]
            if not new:
                return None, errors
            errors += new
            for item in error.errors():
                _forget(tree, item["loc"])
                forgotten |= {str(item["loc"][0])} if len(item["loc"]) == 1 else set()


def _forget(tree: dict[str, Any], location: Sequence[Any]) -> None:
    """Take the value at ``location`` out of the tree, or what is above it if it is not there or stands in a list."""
    node: Any = tree
    path: list[tuple[dict[str, Any], str]] = []
    for part in location:
        if not isinstance(node, dict) or part not in node:
            break
        path.append((node, part))
        node = node[part]
    if path:
        parent, key = path[-1]
        del parent[key]


def _apply(tree: dict[str, Any], override: str) -> str | None:
    """Set one ``key=value``; what is wrong with it, if anything."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return f"{override!r} is no key=value"
    try:
        value = parse_value(text, key)
    except ValueError as error:
        return str(error)
    node: Any = tree
    *parents, last = key.split(".")
    if parents[:1] == ["deepspeed"] and isinstance(tree.get("deepspeed"), str):
        try:  # a key of the file that is named: the others stay as they are there
            tree["deepspeed"] = read_json_object(find_file(tree["deepspeed"], "deepspeed"))
        except ValueError as error:
            return str(error)
    for parent in parents:
        if isinstance(node, list):
            if not parent.isdigit() or int(parent) >= len(node):
                return f"{key}: {parent!r} is no index into a list of {len(node)}"
            node = node[int(parent)]
            continue
        if not isinstance(node.get(parent), dict | list):
            node[parent] = {}
        node = node[parent]
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            return f"{key}: {last!r} is no index into a list of {len(node)}"
        node[int(last)] = value
    else:
        node[last] = value
    return None


def _explain(error: ValidationError, parents: Sequence[Any] = ()) -> list[str]:
    """One line for each key that is wrong; ``parents`` is where in the settings what was checked stands."""
    lines: dict[str, str] = {}
    for item in error.errors():
        location = [part for part in (*parents, *item["loc"]) if part not in ("str", "dict[str,any]")]
        key = ".".join(str(part) for part in location)
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            line = f"{key}: unknown key{_nearest_key(location)}"
        elif item["type"] == "value_error":
            name = message.partition("=")[0]
            # A setting of the chosen method is no key that the tree knows.
            names_own_key = key in Config.model_fields and (key == "pruning" or name in _known_keys(location))
            names_own_key = names_own_key and name.isidentifier()
            line = f"{key}.{message}" if names_own_key else f"{key}: {message}" if key else message
        else:
            if item["type"] in ("model_type", "dict_type", "model_attributes_type"):
                known = ", ".join(_known_keys(location))
                message = f"it takes keys, not a single value{f'; known: {known}' if known else ''}"
            if item["type"] == "list_type" and isinstance(item["input"], dict | str):
                message += "; write it in brackets, [...], or each entry on a line of its own that begins with '- '"
            shown = repr(item["input"])
            if item["type"] == "string_type" and isinstance(item["input"], int | float):
                text = "..." if isinstance(item["input"], bool) else item["input"]
                message += f"""; quote a text: '{key}="{text}"'"""
            whole = item["type"] == "missing" or len(shown) > LONGEST_SHOWN
            line = f"{key}: {message}{'' if whole else f' (it is {shown})'}"
        lines.setdefault(key, line)
    return list(lines.values())


def _nearest_key(location: Sequence[Any]) -> str:
    """What an error says after an unknown key: another library's name for a setting, the same key in another section,
    or the nearest."""
    *parents, name = location
    if name in OTHER_NAMES:
        return f"; here it is {OTHER_NAMES[name]}"
    elsewhere = [
        f"{section}.{name}"
        for section, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        if name in field.annotation.model_fields
    ]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    return did_you_mean(str(name), _known_keys(parents), parents)


def _known_keys(location: Sequence[Any]) -> list[str]:
    """The keys of the section at ``location``."""
    section: Any = Config
    for part in location:
        if isinstance(part, int) or not isinstance(section, type) or not issubclass(section, Section):
            continue
        annotation = section.model_fields[part].annotation
        arguments = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, Section)]
        section = arguments[0] if arguments else annotation
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, Section) else []


def without_effect(config: Config) -> list[str]:
    """Settings that were given but do nothing in this run, one line each."""
    lines = []
    if not config.data.eval:
        given = sorted({"eval_every", "eval_shuffled", "eval_show"} & config.train.model_fields_set)
        lines += [f"train.{key} has no effect: data.eval names no file" for key in given if getattr(config.train, key)]
    if config.pruning.method == "none":
        given = sorted(config.pruning.model_fields_set - {"method"})
        lines += [f"pruning.{key} has no effect: pruning.method is none" for key in given]
        if config.data.eval and config.train.eval_show:
            lines.append("train.eval_show has no effect: pruning.method is none")
    else:
        lines += _phases_without_effect(config)
    for which in ("train", "eval"):
        lines += _sources_without_effect(config, which)
    if config.train.spike_threshold is None and "spike_window" in config.train.model_fields_set:
        lines.append("train.spike_window has no effect: train.spike_threshold is null")
    if config.train.on_non_finite == "stop" and config.data.unsupervised == "error":
        given = sorted({"max_skipped", "max_skipped_in_a_row"} & config.train.model_fields_set)
        lines += [f"train.{key} has no effect: no setting lets a step be skipped" for key in given]
    if config.model.tokenizer is not None and config.train.init_from is not None:
        lines.append("model.tokenizer has no effect: train.init_from brings its own")
    return lines


def _sources_without_effect(config: Config, which: Literal["train", "eval"]) -> list[str]:
    lines = []
    for number, source in enumerate(config.sources(which)):
        if which == "eval" and source.weight != 1:
            lines.append(f"data.eval.{number}.weight has no effect: an evaluation takes every sample once")
        if config.data.template == "plain" and (source.prompt.prefix or source.prompt.suffix):
            lines.append(f"data.{which}.{number}.prompt: the template plain keeps only the images of user turns")
    return lines


def _phases_without_effect(config: Config) -> list[str]:
    lines = []
    pruning, warmup = config.pruning, config.pruning.warmup
    if pruning.full_token_share and not config.full_token_share:
        lines.append(
            "pruning.full_token_share has no effect: the decoder is frozen (projector alignment), so every step drops "
            "tokens; train language_model or lora too for steps on full tokens"
        )
    if warmup is not None and warmup.kind == "dense" and "start" in warmup.model_fields_set:
        lines.append("pruning.warmup.start has no effect: pruning.warmup.kind is dense")
    if pruning.consistency_temperature != 1 and not pruning.consistency_weight:
        lines.append("pruning.consistency_temperature has no effect: pruning.consistency_weight is 0")
    if warmup is not None and config.full_token_share == 1 and not pruning.consistency_weight:
        lines.append("pruning.warmup has no effect: pruning.full_token_share=1 runs every step on full tokens")
    return lines


def dump_config(config: Config) -> str:
    """Everything resolved, DeepSpeed's settings too, as YAML."""
    tree = {**config.model_dump(mode="json"), "deepspeed": config.deepspeed_config()}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def changed_settings(before: str, now: str) -> list[str]:
    """``key: old -> new`` of each setting that differs between two results of :func:`dump_config`.

    Settings that ``before`` does not know, because an older version wrote it, count as their defaults.
    """
    new = yaml.safe_load(now)
    try:
        old = yaml.safe_load(before)
    except yaml.YAMLError:
        old = None
    if not isinstance(old, dict):
        return ["its config.yaml cannot be read"]
    try:
        old = {**Config.model_validate(old).model_dump(mode="json"), "deepspeed": old["deepspeed"]}
    except ValueError:  # it has settings that are gone by now: they are differences too
        log.debug("the settings before cannot be filled in", exc_info=True)
    if isinstance(old.get("deepspeed"), str):  # a version that wrote only the file's name
        old, new = ({**tree, "deepspeed": None} for tree in (old, new))
    return [f"{key}: {before} -> {after}" for key, before, after in differences(old, new)]


def differences(old: Any, new: Any, key: str = "") -> list[tuple[str, str, str]]:
    """``(key, old, new)`` of each value that differs between two trees, as deep as both have keys."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(name, old.get(name, NOT_SET), new.get(name, NOT_SET)) for name in {**old, **new}]
    elif isinstance(old, list) and isinstance(new, list) and any(isinstance(item, dict) for item in [*old, *new]):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip_longest(old, new, fillvalue=NOT_SET))]
    else:
        return [] if old == new else [(key, _shown(old), _shown(new))]
    return [found for name, a, b in pairs for found in differences(a, b, f"{key}.{name}" if key else str(name))]


def _shown(value: Any) -> str:
    return value if value is NOT_SET else repr(value)
