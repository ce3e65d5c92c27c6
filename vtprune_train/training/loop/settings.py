"""Settings completed at start: from ``train.init_from``, and learning rates for methods with learned parameters."""

from __future__ import annotations

import logging
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedConfig

from vtprune_train.config.errors import ConfigError, pruning_refusal
from vtprune_train.config.pruning import TRAINING_ONLY, PruningConfig
from vtprune_train.config.settings import Config
from vtprune_train.models.families import register_family
from vtprune_train.models.forward.encoder import check_tower
from vtprune_train.models.io.build import family_of_config, resolve_checkpoint, saved_pruning
from vtprune_train.pruning.learned import learns
from vtprune_train.training import distributed as ranks

log = logging.getLogger(__name__)


def with_saved_settings(config: Config) -> Config:
    """With ``train.init_from``, take the model and all pruning settings missing from the YAML from that checkpoint, and
    log every difference. Registers the family named by ``model.family``."""
    if config.model.family is not None:
        register_family(config.model.family, "model.family")
    source = config.train.init_from
    if source is None:
        return with_pruning_rate(config)
    model = config.model.model_copy(
        update={"path": resolve_checkpoint(source), "config": None, "language_model": None, "vision_tower": None,
                "projector": None, "tokenizer": None}
    )  # fmt: skip
    method = config.pruning.method if "method" in config.pruning.model_fields_set else None
    pruning = merge_pruning(config.pruning, saved_pruning(source, method))
    return with_pruning_rate(config.model_copy(update={"model": model, "pruning": pruning}))


def with_pruning_rate(config: Config) -> Config:
    """Set the learning rate of the method's learned parameters; defaults to the projector's rate. Raises
    ``ConfigError`` if neither is set, or if a rate is set but the method has no learned parameters."""
    train, name = config.model.train, config.pruning.method
    if not learns(config.pruning.build()):
        if "pruning" in train:
            raise ConfigError(f"model.train.pruning is set, but pruning.method={name} adds no parameters; remove it")
        return config
    if "pruning" in train:
        return config
    if "projector" not in train:
        raise ConfigError(
            f"pruning.method={name} adds parameters, but model.train has no learning rate for pruning (nor for "
            "projector, the default); for example model.train={pruning: 1.0e-3, language_model: 2.0e-5}"
        )
    model = config.model.model_copy(update={"train": {**train, "pruning": train["projector"]}})
    return config.model_copy(update={"model": model})


def check_phases(config: Config, model_config: PreTrainedConfig) -> None:
    """Check that the method fits the model with everything that steps draw (``pruning.budgets``,
    ``pruning.curriculum``), and not only as configured.

    Raises:
        ConfigError: it does not; the message names the setting.
    """
    family, _ = family_of_config(model_config)
    try:
        for method in config.phases(1, model_config.get_text_config().num_hidden_layers).ends():
            if method is not None:
                check_tower(model_config, family, method)
    except ValueError as error:
        raise ConfigError(pruning_refusal(error)) from error


def merge_pruning(asked: PruningConfig, saved: dict[str, Any] | None) -> PruningConfig:
    """The checkpoint's pruning settings, overridden by those set explicitly in ``asked``."""
    saved = saved or {"method": "none"}
    explicit = {key: getattr(asked, key) for key in asked.model_fields_set}
    same_method = explicit.get("method", saved["method"]) == saved["method"]
    try:
        result = PruningConfig(**{**(saved if same_method else {}), **explicit})
    except ValidationError as error:
        reasons = "; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())
        raise ConfigError(f"pruning (with the settings of train.init_from as defaults): {reasons}") from error
    differences = {
        key: (saved.get(key), value)
        for key, value in result.model_dump().items()
        if key in explicit and key not in TRAINING_ONLY and value != saved.get(key)
    }
    if ranks.rank() == 0:
        for key, (before, now) in differences.items():
            log.warning("pruning.%s: the checkpoint was trained with %s, this run uses %s", key, before, now)
        if not differences:
            log.info("pruning settings taken from the checkpoint: %s", result.model_dump())
    return result
