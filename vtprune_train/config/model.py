"""The section ``model``."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from vtprune_train.config.errors import did_you_mean
from vtprune_train.config.section import Section
from vtprune_train.core.backends import BACKENDS
from vtprune_train.core.user_code import is_path

TRAINABLE = ("projector", "language_model", "vision_tower", "lora", "pruning")


class PeftConfig(Section):
    """An adapter on the language model; its learning rate is `model.train.lora`."""

    kind: Literal["lora", "dora", "qlora"] = Field(
        "lora",
        description="Kind of adapter. `dora` also trains the magnitude of each row; `qlora` trains LoRA on a 4-bit "
        "language model and needs bitsandbytes.",
    )
    r: int = Field(16, ge=1, description="Rank of the adapter matrices.")
    alpha: int = Field(32, ge=1, description="Scale: the adapter's output is multiplied by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input during training.")
    target_modules: list[str] | None = Field(
        None,
        description="Names of the layers to adapt, for example [q_proj, v_proj]; null adapts all linear layers of "
        "the decoder.",
    )
    use_rslora: bool = Field(False, description="Multiply by alpha / sqrt(r) instead of alpha / r (rank-stabilized).")
    bias: Literal["none", "lora_only"] = Field(
        "none", description="Biases to train. `lora_only` trains the biases of the adapted layers."
    )

    @field_validator("target_modules")
    @classmethod
    def _names(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and not value:
            raise ValueError("is empty; set it to null to adapt all linear layers of the decoder")
        return value


class ModelConfig(Section):
    """Where the model comes from and which of its parts are trained. Set exactly one of `path` (a checkpoint),
    `language_model` with `vision_tower` (parts to combine) and `config` (a new model), or `train.init_from`."""

    path: str | None = Field(
        None, description="Vision-language checkpoint to start from: a folder or a Hugging Face Hub id."
    )
    language_model: str | None = Field(
        None,
        description="Language model to combine with a vision tower: a folder or Hub id. Llama, Vicuna, Mistral, "
        "Qwen2 and Qwen3 checkpoints work.",
    )
    vision_tower: str | None = Field(
        None, description="Vision tower to combine with the language model: a folder or Hub id of a CLIP checkpoint."
    )
    projector: str | None = Field(
        None,
        description="Run or checkpoint whose projector (and `image_newline`) replaces the model's. null keeps the "
        "checkpoint's, or creates a new one.",
    )
    config: dict[str, Any] | None = Field(
        None,
        description="Sizes of a new model, as in a Hugging Face `config.json`; nothing is downloaded. "
        "`text_config.vocab_size` is also the size of the tokenizer trained on the data. `model_type` selects the "
        "family and defaults to `llava_next`.",
    )
    tokenizer: str | None = Field(
        None, description="Folder or Hub id of the tokenizer; null uses the checkpoint's, or trains one on the data."
    )
    image_grid_pinpoints: list[tuple[int, int]] | None = Field(
        [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)],
        description="AnyRes resolutions (height, width) for a model combined from parts. null builds a LLaVA-1.5, "
        "where each image is one tile. A checkpoint has its resolutions in its config.",
    )
    max_pixels: int | None = Field(
        None,
        ge=1,
        description="Largest image in pixels, for Qwen's families: larger images are shrunk. null keeps the "
        "checkpoint's limit.",
    )
    attention: str = Field(
        "auto",
        description="Attention kernel for packed batches. `auto` takes the fastest one that works here and logs why "
        f"faster ones do not; `varlen_sdpa` works everywhere. Kernels: {', '.join(BACKENDS)}, or your own function, "
        "written path/to/file.py:function.",
    )
    family: str | None = Field(
        None,
        description="Model family outside the package, written path/to/file.py:FAMILY. null: the families of the "
        "package.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="Data type of weights and activations. The optimizer's master weights are float32."
    )
    liger: bool = Field(
        False,
        description="Use liger-kernel's fused norm, MLP and rotary kernels (GPU) instead of compiled decoder layers.",
    )
    fp8: bool = Field(
        False,
        description="Use float8 matrix products in the decoder's linear layers. Needs torchao and, on a GPU, "
        "compute capability 8.9 or newer.",
    )
    peft: PeftConfig | None = Field(
        None, description="Adapter (LoRA, DoRA, QLoRA) on the language model, whose weights are frozen; null: none."
    )
    train: dict[str, float] = Field(
        {"projector": 2e-5, "language_model": 2e-5, "vision_tower": 2e-6},
        description="Peak learning rate of each part to train. Parts are projector, language_model, vision_tower, "
        "lora and pruning; those left out, or null, are frozen. `projector` includes `image_newline`; `lora` is the "
        "adapter of `model.peft`; `pruning` is the learned parameters of the pruning method.",
    )

    @field_validator("attention")
    @classmethod
    def _known_backend(cls, value: str) -> str:
        if value not in ("auto", *BACKENDS) and not is_path(value):
            raise ValueError(
                f"{value!r} is not an attention backend{did_you_mean(value, ('auto', *BACKENDS))}; or name a function "
                "by its path: path/to/file.py:function"
            )
        return value

    @field_validator("train", mode="before")
    @classmethod
    def _null_freezes(cls, value: Any) -> Any:
        return {part: rate for part, rate in value.items() if rate is not None} if isinstance(value, dict) else value

    @field_validator("train")
    @classmethod
    def _known_parts(cls, value: dict[str, float]) -> dict[str, float]:
        for part, rate in value.items():
            if part not in TRAINABLE:
                raise ValueError(f"{part!r} is not a part of the model{did_you_mean(part, TRAINABLE)}")
            if not 0 < rate < math.inf:
                raise ValueError(
                    f"{part}: the learning rate {rate} is not positive and finite; set the part to null to freeze it"
                )
        if not value:
            raise ValueError("is empty, so nothing would be trained; for example {projector: 1.0e-3}")
        return value

    @model_validator(mode="after")
    def _adapter_has_a_rate(self) -> ModelConfig:
        if self.peft is None:
            if "lora" in self.train:
                raise ValueError("train has a rate for lora, but no adapter is set; for example peft={r: 16}")
            return self
        if "language_model" in self.train:
            raise ValueError(
                "train has a rate for language_model, which peft freezes; set a rate for the adapter instead, for "
                "example train={lora: 2.0e-4, projector: 2.0e-5, language_model: null}, or peft=null to train it fully"
            )
        if "lora" not in self.train:
            raise ValueError("train has no rate for the adapter of peft; for example train={lora: 2.0e-4}")
        return self

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        parts = self.language_model is not None or self.vision_tower is not None
        keys = ("path",), ("config",), ("language_model", "vision_tower")
        sources = [names for names in keys if any(getattr(self, name) is not None for name in names)]
        if len(sources) > 1:
            named = " and ".join(" with ".join(f"model.{name}" for name in names) for names in sources)
            nulls = " ".join(f"model.{name}=null" for names in sources[1:] for name in names)
            raise ValueError(
                f"{named} are {'both' if len(sources) == 2 else 'all'} set; a model has one source: to start from "
                f"model.{' and model.'.join(sources[0])} set {nulls}"
            )
        if parts and (self.language_model is None or self.vision_tower is None):
            raise ValueError("language_model and vision_tower must be set together")
        vocab = ((self.config or {}).get("text_config") or {}).get("vocab_size")
        if self.config is not None and self.tokenizer is None and not isinstance(vocab, int):
            raise ValueError(
                "config.text_config.vocab_size is missing; a tokenizer of this size is trained on the data"
            )
        return self
