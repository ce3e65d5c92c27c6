"""Load the settings of a run from YAML and ``key=value``, and report all errors at once."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from vtprune_train.config.errors import ConfigError
from vtprune_train.config.include import include_mixtures, include_pruning
from vtprune_train.config.inherit import read_settings
from vtprune_train.config.messages import explain
from vtprune_train.config.paths import find_file, read_deepspeed
from vtprune_train.config.pruning import DEFAULT_METHOD, TRAINING_ONLY
from vtprune_train.config.settings import Config
from vtprune_train.core.user_code import is_path
from vtprune_train.files.parse import parse_value

log = logging.getLogger(__name__)

NOT_SET = "not set"


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Load a YAML file and its bases, apply ``key=value`` overrides, and validate the result.

    Args:
        path: a path, or the name of a recipe of the package (see :func:`find_file`).
        overrides: for example ``train.clip=1.0``; dots separate nested keys, values are YAML.

    Raises:
        ConfigError: settings are wrong; one line for each error.
    """
    file = find_file(path, "--config")
    tree, sources, errors = read_settings(file)
    _change_method(tree, overrides)
    for override in overrides:
        try:
            _apply(tree, override)
        except ValueError as error:
            errors.append(str(error))
        sources.override(override.partition("=")[0])
        errors += [*include_mixtures(tree, file), *include_pruning(tree, file)]
    config, more = _validate(tree)
    if errors or more or config is None:
        raise ConfigError("\n".join(map(sources.named, errors + more)))
    return config


def _change_method(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """If an override chooses a different method than the file, drop the file's settings for its method. With ``none``
    they stay, and :func:`without_effect` warns about them."""
    section, prefix = tree.get("pruning"), "pruning.method="
    chosen = [override.removeprefix(prefix) for override in overrides if override.startswith(prefix)]
    if not chosen or not isinstance(section, dict) or chosen[-1] in ("none", section.get("method", DEFAULT_METHOD)):
        return
    left_out = [key for key in section if key not in ("method", *TRAINING_ONLY)]
    for key in left_out:
        del section[key]
    if left_out:
        log.info(
            "pruning.%s of the file belong to %s and are left out; pruning.method=%s starts from its defaults",
            ", ".join(left_out),
            section.get("method", DEFAULT_METHOD),
            chosen[-1],
        )


def _validate(tree: dict[str, Any]) -> tuple[Config | None, list[str]]:
    """Validate the settings; returns them (``None`` if they are wrong) and all errors. A wrong value is replaced by its
    default, so that the other values, and checks across several keys, can be validated too."""
    errors: list[str] = []
    removed: set[str] = set()  # whole sections; that they are missing is not an error of the user
    tree = copy.deepcopy(tree)
    while True:
        try:
            return Config.model_validate(tree), errors
        except ValidationError as error:
            new = [line for line in explain(error) if line not in errors]
            new = [line for line in new if not any(line.startswith(section) for section in removed)]
            if not new:
                return None, errors
            errors += new
            for item in error.errors():
                _remove(tree, item["loc"])
                removed |= {str(item["loc"][0])} if len(item["loc"]) == 1 else set()


def _remove(tree: dict[str, Any], location: Sequence[Any]) -> None:
    """Remove the value at ``location`` from the tree; if it is missing or in a list, remove what contains it."""
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
    """Set one ``key=value``.

    Raises:
        ValueError: it is not ``key=value``, the value is not YAML, or an index is outside of its list.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{override!r} is not key=value")
    value = parse_value(text, key)
    *parents, last = key.split(".")
    if parents[:1] == ["deepspeed"] and isinstance(tree.get("deepspeed"), str):
        # read the file, so that its other keys stay
        tree["deepspeed"] = read_deepspeed(tree["deepspeed"])
    node: Any = tree
    for part in parents:
        place = _place(node, part, key)
        if isinstance(node, dict) and not isinstance(node.get(part), dict | list):
            node[part] = {}
        node = node[place]
    node[_place(node, last, key)] = value


def _place(node: dict[str, Any] | list[Any], part: str, key: str) -> Any:
    """One part of a key as an index into ``node``."""
    if isinstance(node, dict):
        return part
    if not part.isdigit() or int(part) >= len(node):
        raise ValueError(f"{key}: {part!r} is not an index into a list of {len(node)}")
    return int(part)


def without_effect(config: Config) -> list[str]:
    """Settings that are set but have no effect in this run, one line each."""
    lines = []
    if config.data.eval and config.train.eval_show and not config.train.trackers:
        lines.append("train.eval_show has no effect: train.trackers is empty")
    if not config.data.eval:
        keys = sorted({"eval_every", "eval_shuffled", "eval_show"} & config.train.model_fields_set)
        lines += [f"train.{key} has no effect: data.eval is empty" for key in keys if getattr(config.train, key)]
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
        lines += [f"train.{key} has no effect: no setting allows skipped steps" for key in keys]
    lines += _rates_without_effect(config)
    if config.model.tokenizer is not None and config.train.init_from is not None:
        lines.append("model.tokenizer has no effect: train.init_from has a tokenizer")
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
    lines = [f"train.{key} has no effect: {idle[key][1]}" for key in keys]
    if train.optimizer == "muon" and not {"language_model", "vision_tower"} & set(config.model.train):
        lines.append(
            "train.optimizer=muon has no effect: AdamW updates all trained parameters, because Muon only handles "
            "matrices of language_model and vision_tower, which model.train does not contain"
        )
    return lines


def _sources_without_effect(config: Config, which: Literal["train", "eval"]) -> list[str]:
    lines = []
    for number, source in enumerate(config.sources(which)):
        if which == "eval" and source.weight != 1:
            lines.append(f"data.eval.{number}.weight has no effect: an evaluation uses every sample once")
        if config.data.template == "plain" and (source.prompt.prefix or source.prompt.suffix):
            lines.append(f"data.{which}.{number}.prompt has no effect: the template plain drops the text of user turns")
    return lines


def _phases_without_effect(config: Config) -> list[str]:
    lines = []
    pruning, warmup = config.pruning, config.pruning.warmup
    if pruning.full_token_share and not config.full_token_share:
        lines.append(
            "pruning.full_token_share has no effect: the decoder is frozen (projector alignment), so every step drops "
            "tokens; also train language_model or lora for steps on all tokens"
        )
    if (course := pruning.curriculum) is not None and not pruning.consistency_weight:
        for key in ("teacher", "teacher_growth"):
            if key in course.model_fields_set:
                lines.append(f"pruning.curriculum.{key} has no effect: pruning.consistency_weight is 0")
    if warmup is not None and warmup.kind == "dense" and "start" in warmup.model_fields_set:
        lines.append("pruning.warmup.start has no effect: pruning.warmup.kind is dense")
    if pruning.consistency_temperature != 1 and not pruning.consistency_weight:
        lines.append("pruning.consistency_temperature has no effect: pruning.consistency_weight is 0")
    if warmup is not None and config.full_token_share == 1 and not pruning.consistency_weight:
        lines.append("pruning.warmup has no effect: pruning.full_token_share=1 runs every step on all tokens")
    return lines


def dump_config(config: Config) -> str:
    """All settings, resolved, with the content of the DeepSpeed file, as YAML."""
    tree = {**config.model_dump(mode="json"), "deepspeed": config.deepspeed_config()}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def changed_settings(before: str, now: str) -> list[str]:
    """``key: old -> new`` for each setting that differs between two results of :func:`dump_config`.

    Settings missing from ``before``, written by an older version, count as their defaults, unless completing them would
    run the code of a method that only ``before`` names.
    """
    from vtprune_train.pruning import check_trusted

    new = yaml.safe_load(now)
    try:
        old = yaml.safe_load(before)
    except yaml.YAMLError:
        old = None
    if not isinstance(old, dict):
        return ["its config.yaml cannot be read"]
    try:
        check_trusted(old.get("pruning"), "the checkpoint")  # the validation imports the method
        old = {**Config.model_validate(old).model_dump(mode="json"), "deepspeed": old["deepspeed"]}
    except ValueError:  # an untrusted method, or settings that no longer exist, which are reported as differences
        log.debug("the older settings cannot be completed", exc_info=True)
    if isinstance(old.get("deepspeed"), str):  # an older version wrote only the name of the file
        old, new = ({**tree, "deepspeed": None} for tree in (old, new))
    return [f"{key}: {before} -> {after}" for key, before, after in differences(old, new)]


def differences(old: Any, new: Any, key: str = "") -> list[tuple[str, str, str]]:
    """``(key, old, new)`` of each value that differs between two nested mappings."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(name, old.get(name, NOT_SET), new.get(name, NOT_SET)) for name in {**old, **new}]
    elif isinstance(old, list) and isinstance(new, list) and any(isinstance(item, dict) for item in [*old, *new]):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip_longest(old, new, fillvalue=NOT_SET))]
    else:
        before, now = ("null" if value is None else value if value is NOT_SET else repr(value) for value in (old, new))
        return [] if old == new else [(key, before, now)]
    return [change for name, a, b in pairs for change in differences(a, b, f"{key}.{name}" if key else str(name))]
