"""The typed tree of settings (``config/load.py`` reads it)."""

from __future__ import annotations

import difflib
import heapq
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from vtprune_train.core.rounding import ceil_of
from vtprune_train.core.user_code import is_path
from vtprune_train.files.parse import read_json_object

PACKAGED_CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"
COMPARED_NAMES = 500
SETTINGS = (".yaml", ".yml", ".json")
OPTIMIZERS = ("adamw", "adamw_8bit", "muon")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
TRAINABLE = ("projector", "language_model", "vision_tower", "lora", "pruning")


class ConfigError(ValueError):
    """All that is wrong with a run's settings, one line each."""


def refusal(what: str, error: Exception) -> str:
    """What the user reads when settings or data cannot be used, or a guard stops: the reasons, without a traceback."""
    return "\n".join([f"{what}:", *(f"  {line}" for line in str(error).splitlines())])


def pruning_refusal(error: Exception) -> str:
    """What a method refused, with its place in the settings; ``setting=value ...`` is a key of the section."""
    return f"pruning.{error}" if str(error).partition("=")[0].isidentifier() else f"pruning: {error}"


def nearest_name(name: str, names: Iterable[str], cutoff: float) -> str | None:
    """The one of ``names`` that is most like ``name``, as :mod:`difflib` compares; of tens of thousands it compares
    those that begin and end most like it."""

    def shared_ends(other: str) -> int:
        pairs = ((name, other), (name[::-1], other[::-1]))
        return sum(len(os.path.commonprefix(pair)) for pair in pairs)  # noqa: RUF071 (of names)

    candidates = list(names)
    if len(candidates) > COMPARED_NAMES:
        candidates = heapq.nlargest(COMPARED_NAMES, candidates, key=shared_ends)
    return next(iter(difflib.get_close_matches(name, candidates, n=1, cutoff=cutoff)), None)


def did_you_mean(word: str, known: Sequence[str], parents: Sequence[Any] = ()) -> str:
    """What an error says after an unknown word: the nearest of ``known``, or all of them."""
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    prefix = "".join(f"{part}." for part in parents)
    return f"; did you mean {prefix}{nearest[0]}?" if nearest else f"; known: {', '.join(known)}"


def find_file(name: str, key: str) -> Path:
    """``name`` as it is, or in ``configs/`` of the project.

    Raises:
        ConfigError: it is in neither place.
    """
    for candidate in (Path(name), PACKAGED_CONFIGS / name, PACKAGED_CONFIGS.parent / name):
        if candidate.is_file():
            return candidate
    asked = Path(name)
    if asked.is_dir():
        raise ConfigError(f"{key}: {name} is a folder; name a file in it")
    packaged = "deepspeed/*.json" if asked.suffix == ".json" else "*.yaml"
    known = {path.name: path.relative_to(PACKAGED_CONFIGS.parent) for path in sorted(PACKAGED_CONFIGS.glob(packaged))}
    files = {**known, **{path.name: path for path in asked.parent.glob("*.[jy]*") if path.suffix in SETTINGS}}
    nearest = nearest_name(asked.name, (name for name in files if name in known or files[name].is_file()), 0.6)
    meant = f"; did you mean {files[nearest]}?" if nearest else ""
    raise ConfigError(
        f"{key}: {name} is neither here nor in {PACKAGED_CONFIGS.name}/ (there: {', '.join(known)}){meant}"
    )


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class RunConfig(Section):
    """Where a run lives and how it is seeded."""

    name: str = Field("run", min_length=1)
    output_dir: str = "runs"
    seed: int = Field(42, ge=0)
    stop_after: int | None = Field(None, ge=1)


class PeftConfig(Section):
    """An adapter on the language model's decoder; its learning rate is ``model.train``'s ``lora``."""

    kind: Literal["lora", "dora", "qlora"] = "lora"
    r: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] | None = None
    use_rslora: bool = False
    bias: Literal["none", "lora_only"] = "none"

    @field_validator("target_modules")
    @classmethod
    def _names(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and not value:
            raise ValueError("names no layer; null adapts all linear layers of the decoder")
        return value


class ModelConfig(Section):
    """Where the model comes from, exactly one of: ``path``; ``language_model`` + ``vision_tower``; ``config``."""

    path: str | None = None
    language_model: str | None = None
    vision_tower: str | None = None
    projector: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    image_grid_pinpoints: list[tuple[int, int]] | None = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
    max_pixels: int | None = Field(None, ge=1)
    attention: Literal[
        "auto", "flash_attention_2", "flash_attention_3", "flash_attention_4", "varlen_torch", "varlen_sdpa"
    ] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    liger: bool = False
    fp8: bool = False
    peft: PeftConfig | None = None
    train: dict[str, float] = {"projector": 2e-5, "language_model": 2e-5, "vision_tower": 2e-6}

    @field_validator("train")
    @classmethod
    def _known_parts(cls, value: dict[str, float]) -> dict[str, float]:
        for part, rate in value.items():
            if part not in TRAINABLE:
                raise ValueError(f"{part!r} is no part of the model{did_you_mean(part, TRAINABLE)}; parts: {TRAINABLE}")
            if not 0 < rate < math.inf:
                raise ValueError(
                    f"{part}: the learning rate {rate} is not positive and finite; leave the part out to freeze it"
                )
        if not value:
            raise ValueError("names no part, so nothing would be trained; for example {projector: 1.0e-3}")
        return value

    @model_validator(mode="after")
    def _adapter_has_a_rate(self) -> ModelConfig:
        if self.peft is None:
            if "lora" in self.train:
                raise ValueError("train names lora, but there is no adapter; set peft, for example peft={r: 16}")
            return self
        if "language_model" in self.train:
            raise ValueError(
                "train names language_model, which peft freezes under its adapter; give the adapter a rate instead, "
                "for example train={lora: 2.0e-4, projector: 2.0e-5}, or set peft to null to train it fully"
            )
        if "lora" not in self.train:
            raise ValueError("train has no rate for peft's adapter; for example train={lora: 2.0e-4}")
        return self

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        parts = self.language_model is not None or self.vision_tower is not None
        origins = [name for name, is_set in (("path", self.path), ("config", self.config), ("parts", parts)) if is_set]
        if len(origins) > 1:
            raise ValueError(
                f"{' and '.join(origins)} are both set; a model comes from exactly one origin, null the others"
            )
        if parts and (self.language_model is None or self.vision_tower is None):
            raise ValueError("language_model and vision_tower belong together; set both")
        vocab = ((self.config or {}).get("text_config") or {}).get("vocab_size")
        if self.config is not None and self.tokenizer is None and not isinstance(vocab, int):
            raise ValueError(
                "config.text_config.vocab_size is missing; a tokenizer of that size is trained on the data"
            )
        return self


def _without_image(value: str) -> str:
    if "<image>" in value:
        raise ValueError(f"{value!r} holds <image>, but a prompt brings no image; place <image> in the records")
    return value


PromptText = Annotated[str, AfterValidator(_without_image)]


class PromptConfig(Section):
    """What a source adds to its conversations: a system prompt for those that bring none, text before and after the
    first user turn's."""

    system: PromptText | None = None
    prefix: PromptText = ""
    suffix: PromptText = ""


class SourceConfig(Section):
    """A data file, a folder or a glob of files, or a dataset on disk; ``path`` and ``images`` are relative to
    ``data.root``. An epoch takes ``weight`` times its samples."""

    path: str = Field(min_length=1)
    images: str = "."
    take: str = "all"
    weight: float = Field(1.0, gt=0, le=1e6)
    prompt: PromptConfig = PromptConfig()
    name: str | None = Field(None, pattern=r"^[^:\s]+$")
    ignore: list[str] = []

    @field_validator("take")
    @classmethod
    def _valid_take(cls, value: str) -> str:
        kind, _, number = value.partition(":")
        if value != "all" and not (kind in ("first", "random") and number.isdecimal() and int(number) > 0):
            raise ValueError(f"{value!r} is none of all, first:N, random:N (N at least 1)")
        return value


class DataConfig(Section):
    """What is trained on and how it becomes tokens."""

    root: str = "."
    train: list[SourceConfig] = []
    eval: list[SourceConfig] = []
    template: str | dict[str, Any] = "vicuna_v1"
    system: PromptText | None = None
    image_position: Literal["as_written", "first"] = "as_written"
    tokenization: Literal["processor", "llava"] = "processor"
    max_length: int = Field(4096, ge=1)
    max_tokens: int = Field(16384, ge=1)
    too_long: Literal["error", "skip"] = "error"
    unsupervised: Literal["error", "skip"] = "error"
    max_bad: int = Field(100, ge=0)
    max_bad_share: float = Field(0.05, ge=0, le=1)
    max_image_pixels: int = Field(89_478_485, ge=1)
    max_record_bytes: int = Field(32 << 20, ge=1)
    max_text_bytes: int = Field(1 << 20, ge=1)
    workers: int = Field(4, ge=0)
    prefetch: int = Field(4, ge=1, le=64)
    worker_timeout: float | None = Field(600.0, gt=0)
    cache_dir: str | None = None

    @model_validator(mode="after")
    def _short_texts(self) -> DataConfig:
        texts = {"system": self.system or ""}
        for which in ("train", "eval"):
            for number, source in enumerate(getattr(self, which)):
                for name in ("system", "prefix", "suffix"):
                    texts[f"{which}.{number}.prompt.{name}"] = getattr(source.prompt, name) or ""
        for key, text in texts.items():
            if len(text.encode(errors="surrogatepass")) > self.max_text_bytes:
                raise ValueError(
                    f"{key} has {len(text)} characters, so that every record's text has more bytes than "
                    f"data.max_text_bytes={self.max_text_bytes}; shorten it or raise max_text_bytes"
                )
        return self

    @field_validator("train", "eval")
    @classmethod
    def _different_names(cls, value: list[SourceConfig]) -> list[SourceConfig]:
        names = [source.name for source in value if source.name is not None]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two entries are named {twice!r}; sample ids begin with the name")
        return value

    @model_validator(mode="after")
    def _max_tokens_hold_a_sample(self) -> DataConfig:
        if self.max_tokens < self.max_length:
            raise ValueError(
                f"max_tokens={self.max_tokens} is smaller than one sample may be (data.max_length={self.max_length}); "
                "raise max_tokens or lower max_length"
            )
        return self


class WarmupConfig(Section):
    """The first steps of training: ``dense`` on all tokens, or keep ratios that go from ``start`` to the method's."""

    steps: int | None = Field(None, ge=1)
    ratio: float | None = Field(None, gt=0, le=1)
    kind: Literal["dense", "linear", "cosine"] = "linear"
    start: float = Field(1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _one_length(self) -> WarmupConfig:
        if (self.steps is None) == (self.ratio is None):
            number = "neither" if self.steps is None else "both"
            raise ValueError(f"set exactly one of steps=N and ratio=R (a share of all steps); {number} is set")
        return self


TRAINING_ONLY = ("warmup", "full_token_share", "consistency_weight", "consistency_temperature")


class PruningConfig(Section):
    """The method with its settings: every key beside ``method`` and :data:`TRAINING_ONLY` is one of that method's, and
    those left out are filled in with its defaults. What training alone does beside it is no part of the method."""

    model_config = ConfigDict(extra="allow", validate_default=True)

    method: str | list[Any] = "pyramiddrop"
    warmup: WarmupConfig | None = None
    full_token_share: float = Field(0.0, ge=0, le=1)
    consistency_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    consistency_temperature: float = Field(1.0, gt=0, allow_inf_nan=False)

    @field_validator("method", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if not isinstance(value, str | list):
            raise ValueError(
                f"{value!r} is no name of a method and no list of them; `vtprune methods --names` has the names, none "
                "is the dense model"
            )
        return value

    @model_validator(mode="after")
    def _builds(self) -> PruningConfig:
        from vtprune_train.pruning import UnknownSettingError

        try:
            method = self.build()
        except UnknownSettingError as error:
            raise UnknownSettingError(error.key, error.method, error.known, ("method", *TRAINING_ONLY)) from None
        if method is None and (wanted := [key for key in TRAINING_ONLY[:3] if getattr(self, key)]):
            raise ValueError(
                f"{wanted[0]} is set, but method is none, so no step drops tokens; null it or name a method"
            )
        if self.consistency_weight and not self.full_token_share:
            raise ValueError(
                f"consistency_weight={self.consistency_weight:g} weighs nothing: no step runs on full tokens; set "
                "full_token_share too (for example 0.1)"
            )
        if method is not None:
            self._check_warmup(method)
            resolved = method.settings()
            self.__dict__["method"] = resolved.pop("method")  # not by assignment: that would count as set by the user
            assert self.__pydantic_extra__ is not None
            self.__pydantic_extra__.update(resolved)
        return self

    def _check_warmup(self, method: Any) -> None:
        if self.warmup is None or self.warmup.kind == "dense":
            return
        method.eased(self.warmup.start, 0.0)
        ratios = method.ratios
        if self.warmup.start < max(ratios):
            shown = list(ratios) if len(ratios) > 1 else ratios[0]
            raise ValueError(
                f"warmup.start={self.warmup.start:g} is below keep={shown}; a warm-up begins with more tokens"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """The method with its settings as plain data, without what training alone does."""
        return {"method": self.method, **(self.__pydantic_extra__ or {})}

    def build(self) -> Any:
        """The method, or ``None`` for ``none``."""
        from vtprune_train.pruning import method_from_settings

        return method_from_settings(self.settings)

    def phases(self, total_steps: int, seed: int) -> Any:
        """The :class:`~vtprune_train.pruning.phases.Phases` of a run of ``total_steps`` steps in which the
        decoder is trained; :meth:`Config.phases` asks whether it is."""
        from vtprune_train.pruning.phases import FullTokens, Phases, Warmup

        warmup = None
        if self.warmup is not None:
            steps = self.warmup.steps or ceil_of(self.warmup.ratio or 0.0, total_steps)
            warmup = Warmup(steps, self.warmup.kind, self.warmup.start)
        full = FullTokens(self.full_token_share, self.consistency_weight, self.consistency_temperature)
        return Phases(self.build(), seed, warmup, full)

    def identity(self) -> dict[str, Any]:
        """What must not change on resume; of the training's own part only what is used, so that checkpoints written
        before it existed can be continued. Those of dense runs have always recorded PyramidDrop's settings."""
        values = self.model_dump()
        defaults = PruningConfig().model_dump()
        used = {key: v for key, v in values.items() if key not in TRAINING_ONLY or v != defaults[key]}
        if self.method != "none":
            return used
        return {**{key: v for key, v in defaults.items() if key not in TRAINING_ONLY}, **used}


class TrainConfig(Section):
    """The loop."""

    global_batch_size: int = Field(128, ge=1)
    epochs: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1)
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    schedule: str = Field("cosine", description="cosine, linear, constant, wsd, or the path of a function")
    decay_ratio: float = Field(0.1, ge=0, le=1, description="share of all steps in which wsd decays the rates")
    min_rate: float = Field(0.0, ge=0, le=1, description="share of the peak rates that the decay ends at")
    optimizer: str = Field("adamw", description="adamw, adamw_8bit, muon, or the path of a torch.optim.Optimizer")
    optimizer_args: dict[str, Any] = Field({}, description="further arguments of the optimizer")
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = Field(0.0, ge=0)
    activation_checkpointing: Literal["all", "first_stage", "none"] | int = "all"
    save_every: int = Field(500, ge=1)
    keep_last: int = Field(3, ge=1)
    export: Literal["every", "last", "never"] = "every"
    eval_every: int | None = Field(None, ge=1)
    eval_shuffled: bool = False
    eval_show: int = Field(0, ge=0)
    on_non_finite: Literal["stop", "skip"] = "stop"
    max_skipped: int = Field(20, ge=0)
    max_skipped_in_a_row: int = Field(3, ge=0)
    spike_threshold: float | None = Field(10.0, gt=0)
    spike_window: int = Field(100, ge=20)
    compile: Literal["auto", "always", "never"] = "auto"
    deterministic: bool = False
    preflight: Literal["auto", "always", "never"] = "auto"
    save_in_background: bool = True
    resume: Literal["auto", "strict", "never"] = "auto"
    init_from: str | None = None
    watchdog_timeout: float | None = Field(600, ge=1)
    collective_timeout: float = Field(1800, ge=1)
    max_restarts: int = Field(0, ge=0)

    @field_validator("optimizer", "schedule")
    @classmethod
    def _known_name(cls, value: str, info: ValidationInfo) -> str:
        names = OPTIMIZERS if info.field_name == "optimizer" else SCHEDULES
        if value not in names and not is_path(value):
            raise ValueError(
                f"unknown {info.field_name} {value!r}{did_you_mean(value, names)}; or give a path: package.module:Name "
                "or path/to/file.py:Name"
            )
        return value

    @field_validator("activation_checkpointing", mode="plain")
    @classmethod
    def _known_level(cls, value: Any) -> str | int:
        if isinstance(value, bool):  # what it was before it had levels
            return "all" if value else "none"
        if value in ("all", "first_stage", "none") or (isinstance(value, int) and value >= 1):
            return value  # type: ignore[no-any-return]
        raise ValueError(f"{value!r} is none of all, first_stage, none, or a number of decoder layers (at least 1)")

    @model_validator(mode="after")
    def _ends_make_sense(self) -> TrainConfig:
        if self.watchdog_timeout is not None and self.collective_timeout <= self.watchdog_timeout:
            raise ValueError(
                f"collective_timeout={self.collective_timeout:g} must be longer than watchdog_timeout="
                f"{self.watchdog_timeout:g}: otherwise a collective breaks before the hung rank is named; raise it"
            )
        if self.max_restarts and self.resume == "never":
            raise ValueError(f"max_restarts={self.max_restarts} needs resume=auto: a restart continues a checkpoint")
        return self


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    pruning: PruningConfig = PruningConfig()
    train: TrainConfig = TrainConfig()
    deepspeed: str | dict[str, Any] = "configs/deepspeed/zero2.json"

    @model_validator(mode="after")
    def _origin(self) -> Config:
        model = self.model
        if not any((model.path, model.config, model.language_model, self.train.init_from)):
            raise ValueError(
                "model has no origin: set model.path, or model.language_model and model.vision_tower, or model.config "
                "(or train.init_from)"
            )
        depth = ((model.config or {}).get("text_config") or {}).get("num_hidden_layers")
        method = self.pruning.build()
        if method is not None and isinstance(depth, int):
            from vtprune_train.pruning.contract import check_method

            try:
                check_method(method, depth)
            except ValueError as error:
                raise ValueError(pruning_refusal(error)) from error
        return self

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.run.output_dir) / self.run.name

    @property
    def full_token_share(self) -> float:
        """The share of this run's steps on full tokens: none where the decoder is frozen, as in projector alignment.
        There every step drops tokens, as in DualSpeed's code (``is_pretraining_stage``)."""
        return self.pruning.full_token_share if {"language_model", "lora"} & set(self.model.train) else 0.0

    def phases(self, total_steps: int) -> Any:
        """The :class:`~vtprune_train.pruning.phases.Phases` of this run, if it has ``total_steps`` steps."""
        from vtprune_train.pruning.phases import FullTokens

        phases = self.pruning.phases(total_steps, self.run.seed)
        return phases if self.full_token_share else replace(phases, full=FullTokens())

    def sources(self, which: Literal["train", "eval"]) -> list[SourceConfig]:
        """The data files with paths joined to ``data.root``."""
        root = Path(self.data.root)
        return [
            source.model_copy(update={"path": str(root / source.path), "images": str(root / source.images)})
            for source in getattr(self.data, which)
        ]

    def deepspeed_config(self) -> dict[str, Any]:
        """The DeepSpeed JSON as a dict.

        Raises:
            ConfigError: the file is missing or no JSON object.
        """
        if isinstance(self.deepspeed, dict):
            return dict(self.deepspeed)
        path = find_file(self.deepspeed, "deepspeed")
        try:
            return read_json_object(path)
        except ValueError as error:
            raise ConfigError(f"deepspeed: {error}") from error
