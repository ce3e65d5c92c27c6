"""All settings of a run (``config/load.py`` reads them from YAML)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from vtprune_train.config.data import DataConfig, SourceConfig
from vtprune_train.config.errors import pruning_refusal
from vtprune_train.config.model import ModelConfig
from vtprune_train.config.paths import read_deepspeed
from vtprune_train.config.pruning import PruningConfig
from vtprune_train.config.run import RunConfig
from vtprune_train.config.section import Section
from vtprune_train.config.train import TrainConfig


class Config(Section):
    """All settings of a run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    pruning: PruningConfig = PruningConfig()
    train: TrainConfig = TrainConfig()
    callbacks: list[str | dict[str, Any]] = Field(
        [],
        description="Additional callbacks: profiler, garbage_collection or path/to/file.py:Class. "
        "Write {class: ..., argument: value} to set arguments.",
    )
    deepspeed: str | dict[str, Any] = Field(
        "configs/deepspeed/zero2.json",
        description="DeepSpeed settings: a JSON file or a mapping, mainly the ZeRO stage. Batch sizes, clipping, "
        "precision and optimizer come from the settings above; setting them here is an error.",
    )

    @model_validator(mode="after")
    def _source(self) -> Config:
        model = self.model
        if not any((model.path, model.config, model.language_model, self.train.init_from)):
            raise ValueError(
                "model has no source: set model.path, or model.language_model and model.vision_tower, or model.config "
                "(or train.init_from)"
            )
        depth = ((model.config or {}).get("text_config") or {}).get("num_hidden_layers")
        method = self.pruning.build()
        if method is not None and isinstance(depth, int):
            from vtprune_train.pruning.contract import check_method

            try:
                check_method(method, depth)
                self.phases(1, depth)
            except ValueError as error:
                raise ValueError(pruning_refusal(error)) from error
        return self

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.run.output_dir) / self.run.name

    @property
    def full_token_share(self) -> float:
        """The share of steps on all tokens; 0 if the decoder is frozen (projector alignment), where every step drops
        tokens as in DualSpeed's code (``is_pretraining_stage``)."""
        return self.pruning.full_token_share if {"language_model", "lora"} & set(self.model.train) else 0.0

    def phases(self, total_steps: int, num_layers: int | None = None) -> Any:
        """The :class:`~vtprune_train.pruning.phases.Phases` of this run, for ``total_steps`` steps and a decoder with
        ``num_layers`` layers (needed for budgets and curricula).

        Raises:
            ValueError: the method does not reach ``pruning.budgets``, or lacks what ``pruning.curriculum`` changes.
        """
        from vtprune_train.pruning.phases import FullTokens

        phases = self.pruning.phases(total_steps, self.run.seed, num_layers)
        return phases if self.full_token_share else replace(phases, full=FullTokens())

    def sources(self, which: Literal["train", "eval"]) -> list[SourceConfig]:
        """The data sources, with paths joined to ``data.root``."""
        root = Path(self.data.root)
        return [
            source.model_copy(
                update={
                    "path": str(root / source.path),
                    "images": str(root / source.images),
                    "videos": None if source.videos is None else str(root / source.videos),
                }
            )
            for source in getattr(self.data, which)
        ]

    def deepspeed_config(self) -> dict[str, Any]:
        """The DeepSpeed JSON as a dict.

        Raises:
            ConfigError: the file is missing or is not a JSON object.
        """
        if isinstance(self.deepspeed, dict):
            return dict(self.deepspeed)
        return read_deepspeed(self.deepspeed)
