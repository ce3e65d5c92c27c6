"""The section ``data``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from vtprune_train.config.section import Section


def _without_image(value: str) -> str:
    if "<image>" in value:
        raise ValueError(f"{value!r} contains <image>, but a prompt has no image; put <image> in the records")
    return value


PromptText = Annotated[str, AfterValidator(_without_image)]


class PromptConfig(Section):
    """Text added to every conversation of a source."""

    system: PromptText | None = Field(
        None,
        description="System prompt of conversations without one, instead of the template's; an empty text means none.",
    )
    prefix: PromptText = Field("", description="Text before the first user turn, after its leading images.")
    suffix: PromptText = Field("", description="Text after the first user turn.")


class VideoConfig(Section):
    """Which frames of a video are used. null means the value of the checkpoint's video processor, or the family's."""

    fps: float | None = Field(None, gt=0, le=1000, description="Sampled frames per second.")
    num_frames: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="Number of sampled frames per video, instead of `data.video.fps`. Shorter videos are used whole.",
    )
    min_frames: int | None = Field(None, ge=1, description="Minimum number of frames with `data.video.fps`.")
    max_frames: int | None = Field(None, ge=1, description="Maximum number of frames with `data.video.fps`.")
    max_pixels: int | None = Field(
        None,
        ge=1,
        description="Maximum number of pixels after resizing. Of each frame in Qwen2-VL and Qwen2.5-VL, of all frames "
        "together in Qwen3-VL and Qwen3.5. An error in families with a fixed frame size.",
    )

    @model_validator(mode="after")
    def _one_number(self) -> VideoConfig:
        if self.fps is not None and self.num_frames is not None:
            raise ValueError(f"fps={self.fps:g} and num_frames={self.num_frames} exclude each other; set one to null")
        for name in ("min_frames", "max_frames"):
            if self.num_frames is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)} is a limit of sampling by fps and has no effect with "
                    f"num_frames={self.num_frames}; set one of them to null"
                )
        if self.min_frames is not None and self.max_frames is not None and self.min_frames > self.max_frames:
            raise ValueError(f"min_frames={self.min_frames} is larger than max_frames={self.max_frames}")
        return self


class SourceConfig(Section):
    """One source of samples. An entry `{include: mixture.yaml}` stands for the entries of that file."""

    path: str = Field(
        min_length=1,
        description="Data file (.json, .jsonl, .parquet, .tar), folder, glob or saved `datasets` dataset, relative to "
        "`data.root`.",
    )
    images: str = Field(
        ".", description="Folder that image paths in records are relative to; itself relative to `data.root`."
    )
    videos: str | None = Field(
        None,
        description="Folder that video paths in records are relative to; itself relative to `data.root`. With null, "
        "records with videos cannot be used.",
    )
    take: str = Field(
        "all", description="Samples to use: all, first:N or random:N. `random` draws with the seed of the run."
    )
    weight: float = Field(
        1.0, gt=0, le=1e6, description="How often an epoch uses each sample: 2 uses each twice, 0.5 uses half of them."
    )
    prompt: PromptConfig = Field(PromptConfig(), description="Text added to every conversation of this source.")
    name: str | None = Field(
        None,
        pattern=r"^[^:\s]+$",
        description="Name in sample ids, without colons and spaces; null uses the entry's number.",
    )
    ignore: list[str] = Field(
        [], description="Fields and markers that would be rejected but are harmless in these records."
    )
    reader: str | None = Field(
        None,
        description="Class that reads other kinds of files, written path/to/file.py:Class. null chooses the reader by "
        "file extension.",
    )

    @field_validator("take")
    @classmethod
    def _valid_take(cls, value: str) -> str:
        kind, _, number = value.partition(":")
        if value != "all" and not (kind in ("first", "random") and number.isdecimal() and int(number) > 0):
            raise ValueError(f"{value!r} is not all, first:N or random:N (N at least 1)")
        return value


class DataConfig(Section):
    """Training and evaluation data, and how it becomes tokens."""

    root: str = Field(".", description="Folder that data paths are relative to.")
    train: list[SourceConfig] = Field(
        [],
        description="Sources to train on, each at least {path: FILE, images: FOLDER}. A file name instead of the list "
        "reads a mixture from that YAML file.",
    )
    eval: list[SourceConfig] = Field([], description="Held-out sources for evaluation, written like `data.train`.")
    template: str | dict[str, Any] = Field(
        "vicuna_v1",
        description="Chat template: auto, plain, vicuna_v1, llama_3, mistral, qwen, or custom fields. `auto` is the "
        "template of the checkpoint's processor. The fields are user, assistant, answer, separator and system. `plain` "
        "is for projector alignment: only images and captions.",
    )
    system: PromptText | None = Field(
        None, description="System prompt instead of the template's; an empty text means none."
    )
    image_position: Literal["as_written", "first"] = Field(
        "as_written",
        description="Position of images in a user turn. `first` moves them to the front, as LLaVA's code does.",
    )
    tokenization: Literal["processor", "llava"] = Field(
        "processor",
        description="Token ids around images: those of the checkpoint's processor, or of LLaVA's code. "
        "Generation uses the same ids. They differ only for some SentencePiece tokenizers.",
    )
    max_length: int = Field(
        4096,
        ge=1,
        description="Maximum number of tokens of a sample, before dropping. Samples are never truncated: see "
        "`data.too_long`.",
    )
    max_tokens: int = Field(
        16384,
        ge=1,
        description="Maximum number of tokens of a micro-batch, before dropping; bounds memory. The number of "
        "micro-batches in a step follows from it and `train.global_batch_size`.",
    )
    too_long: Literal["error", "skip"] = Field(
        "error", description="Samples longer than `data.max_length`: stop with an error, or leave them out."
    )
    unsupervised: Literal["error", "skip"] = Field(
        "error",
        description="Samples without a supervised token: stop with an error, or leave them out. Also applies to a "
        "step that has none left because its images could not be read.",
    )
    max_bad: int = Field(
        100, ge=0, description="Maximum number of malformed or unreadable samples to leave out; one more stops the run."
    )
    max_bad_share: float = Field(
        0.05, ge=0, le=1, description="Maximum share of unusable samples in each source; a larger share stops the run."
    )
    max_image_pixels: int = Field(
        89_478_485,
        ge=1,
        description="Maximum number of pixels of an image or a video frame; larger ones are not read. The default is "
        "Pillow's limit.",
    )
    video: VideoConfig = Field(VideoConfig(), description="Which frames of videos are used.")
    max_record_bytes: int = Field(
        32 << 20,
        ge=1,
        description="Maximum size of a record in bytes, including embedded images. `data.too_long` applies to "
        "larger ones.",
    )
    max_text_bytes: int = Field(
        1 << 20,
        ge=1,
        description="Maximum size of a record's text in bytes, counting 256 extra for each turn. `data.too_long` "
        "applies to longer ones.",
    )
    workers: int = Field(
        4, ge=0, description="Data loader workers of each rank; 0 decodes images in the training process."
    )
    prefetch: int = Field(4, ge=1, le=64, description="Batches that each worker decodes in advance.")
    worker_timeout: float | None = Field(
        600.0, gt=0, description="Seconds without a batch after which a worker counts as hung; null waits forever."
    )
    cache_dir: str | None = Field(
        None, description="Folder of the data index; null puts it next to the cache of `datasets`."
    )

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
                    f"{key} has {len(text)} characters, so every record exceeds "
                    f"data.max_text_bytes={self.max_text_bytes}; shorten it or raise max_text_bytes"
                )
        return self

    @model_validator(mode="after")
    def _auto_is_as_saved(self) -> DataConfig:
        others = {"system": None, "image_position": "as_written", "tokenization": "processor"}
        for name, default in others.items():
            if self.template == "auto" and getattr(self, name) != default:
                instead = "; write it in the entries' prompt.system" if name == "system" else ""
                raise ValueError(
                    f"{name}={getattr(self, name)!r} cannot be used with data.template=auto, because the checkpoint's "
                    f"chat template stays as it is{instead}"
                )
        return self

    @field_validator("train", "eval")
    @classmethod
    def _different_names(cls, value: list[SourceConfig]) -> list[SourceConfig]:
        names = [source.name for source in value if source.name is not None]
        if duplicate := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two entries have the name {duplicate!r}; sample ids begin with it, so it must be unique")
        return value

    @model_validator(mode="after")
    def _max_tokens_hold_a_sample(self) -> DataConfig:
        if self.max_tokens < self.max_length:
            raise ValueError(
                f"max_tokens={self.max_tokens} is smaller than the longest sample (data.max_length={self.max_length}); "
                "raise max_tokens or lower max_length"
            )
        return self
