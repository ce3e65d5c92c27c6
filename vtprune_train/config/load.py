"""A run's settings read: YAML plus ``key=value``, checked as a whole, all errors at once."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from vtprune_train.config.include import include_mixtures, include_pruning
from vtprune_train.config.messages import explain
from vtprune_train.config.settings import TRAINING_ONLY, Config, ConfigError, find_file
from vtprune_train.core.user_code import is_path
from vtprune_train.files.parse import parse_value, read_json_object, read_yaml

log = logging.getLogger(__name__)

NOT_SET = "not set"


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
    errors = [*include_mixtures(tree, file), *include_pruning(tree, file)]
    _change_method(tree, overrides)
    for override in overrides:
        try:
            _apply(tree, override)
        except ValueError as error:
            errors.append(str(error))
        errors += [*include_mixtures(tree, file), *include_pruning(tree, file)]
    config, more = _validate(tree)
    if errors or more or config is None:
        raise ConfigError("\n".join(errors + more))
    return config


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


def _validate(tree: dict[str, Any]) -> tuple[Config | None, list[str]]:
    """The settings, and every error: a wrong value is reported and put back to its default until the rest has been
    checked too, relations between several keys included."""
    errors: list[str] = []
    forgotten: set[str] = set()  # whole sections: errors about their absence are not the user's doing
    tree = copy.deepcopy(tree)
    while True:
        try:
            return Config.model_validate(tree), errors
        except ValidationError as error:
            new = [line for line in explain(error) if line not in errors]
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


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one ``key=value``; refuse another form, a value that is not YAML, and a key that leads outside of a list."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{override!r} is not key=value")
    value = parse_value(text, key)
    *parents, last = key.split(".")
    if parents[:1] == ["deepspeed"] and isinstance(tree.get("deepspeed"), str):
        # a key of the file that is named: the others stay as they are there
        tree["deepspeed"] = read_json_object(find_file(tree["deepspeed"], "deepspeed"))
    node: Any = tree
    for part in parents:
        place = _place(node, part, key)
        if isinstance(node, dict) and not isinstance(node.get(part), dict | list):
            node[part] = {}
        node = node[place]
    node[_place(node, last, key)] = value


def _place(node: dict[str, Any] | list[Any], part: str, key: str) -> Any:
    """``part`` of a key as an index of ``node``."""
    if isinstance(node, dict):
        return part
    if not part.isdigit() or int(part) >= len(node):
        raise ValueError(f"{key}: {part!r} is not an index into a list of {len(node)}")
    return int(part)


def without_effect(config: Config) -> list[str]:
    """Settings that are set but do nothing in this run, one line each."""
    lines = []
    if not config.data.eval:
        keys = sorted({"eval_every", "eval_shuffled", "eval_show"} & config.train.model_fields_set)
        lines += [f"train.{key} has no effect: data.eval names no file" for key in keys if getattr(config.train, key)]
    if config.pruning.method == "none":
        keys = sorted(config.pruning.model_fields_set - {"method"})
        lines += [f"pruning.{key} has no effect: pruning.method is none" for key in keys]
        if config.data.eval and config.train.eval_show:
            lines.append("train.eval_show has no effect: pruning.method is none")
    else:
        lines += _phases_without_effect(config)
    for which in ("train", "eval"):
        lines += _sources_without_effect(config, which)
    if config.train.spike_threshold is None and "spike_window" in config.train.model_fields_set:
        lines.append("train.spike_window has no effect: train.spike_threshold is null")
    if config.train.on_non_finite == "stop" and config.data.unsupervised == "error":
        keys = sorted({"max_skipped", "max_skipped_in_a_row"} & config.train.model_fields_set)
        lines += [f"train.{key} has no effect: no setting lets a step be skipped" for key in keys]
    lines += _rates_without_effect(config)
    if config.model.tokenizer is not None and config.train.init_from is not None:
        lines.append("model.tokenizer has no effect: train.init_from brings its own")
    return lines


def _rates_without_effect(config: Config) -> list[str]:
    train = config.train
    schedule, optimizer = f"train.schedule is {train.schedule}", f"train.optimizer is {train.optimizer}"
    idle = {
        "decay_ratio": (train.schedule != "wsd", schedule),
        "min_rate": (train.schedule == "constant" or is_path(train.schedule), schedule),
        "betas": (is_path(train.optimizer), optimizer),
    }
    keys = [key for key, (is_idle, _) in idle.items() if is_idle and key in train.model_fields_set]
    return [f"train.{key} has no effect: {idle[key][1]}" for key in keys]


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
        before, now = (value if value is NOT_SET else repr(value) for value in (old, new))
        return [] if old == new else [(key, before, now)]
    return [change for name, a, b in pairs for change in differences(a, b, f"{key}.{name}" if key else str(name))]
