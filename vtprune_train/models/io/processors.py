"""The processor of a model: image processor, tokenizer and settings, the same in training and in inference.

It is put together from its parts, because transformers' ``AutoProcessor`` also builds a video processor for some
families, which needs torchvision. Images are always processed by the PIL backend, whether torchvision is installed or
not, so that a model is asked with the pixels that it was trained on. The settings of a checkpoint's video processor are
carried over to what is saved, where ``AutoProcessor`` finds them.
"""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at the top 5.17 wants torchvision
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from transformers.utils import cached_file

from vtprune_train.files.parse import read_json_object
from vtprune_train.models.families import family_of_type
from vtprune_train.models.families.base import Lacks
from vtprune_train.models.io.build import first_line, resolve_checkpoint

log = logging.getLogger(__name__)

IMAGE_FILE, VIDEO_FILE, PROCESSOR_FILE = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)


def open_processor(folder: str, config: PreTrainedConfig) -> Any:
    """The processor that belongs to a model in a Hugging Face folder or on the hub.

    Raises:
        ValueError: there is no readable tokenizer, it has no image token, or a file of the processor is damaged.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {folder}: its tokenizer cannot be loaded ({first_line(error)})") from error
    return build_processor(config, tokenizer, folder)


def build_processor(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, path: str | None = None, max_pixels: int | None = None
) -> Any:
    """The processor of a model; ``path``, the checkpoint that it came from, brings settings that are kept.

    What decides how many tokens an image has (``patch_size``, ``vision_feature_select_strategy``,
    ``num_additional_image_tokens``, ...) comes from the model's config; checkpoints saved by old versions of
    transformers lack these settings, and the model would refuse other counts.

    Raises:
        ValueError: a file of the processor is damaged, or the tokenizer lacks a token that the processor needs.
    """
    path = None if path is None else resolve_checkpoint(path)
    saved = read_settings(path, PROCESSOR_FILE)
    settings = {**_processor_settings(path, saved), **_counting(config, saved, path)}
    named = processor_class_from_name(name) if (name := (saved or {}).get("processor_class")) else None
    processor_class = _without_videos(named or PROCESSOR_MAPPING[type(config)])  # type: ignore[arg-type]
    parts = {"image_processor": build_image_processor(config, path, max_pixels), "tokenizer": tokenizer}
    try:
        arguments = [parts[name] for name in processor_class.get_attributes()]
        processor = processor_class.from_args_and_dict(arguments, settings)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"a {processor_class.__name__} cannot be made from the files in {path} ({first_line(error)}); use the "
            f"tokenizer and the processor files of this {config.model_type} checkpoint"
        ) from error
    image_token = getattr(processor, "image_token", None)
    if image_token is not None and image_token not in tokenizer.get_vocab():
        raise ValueError(
            f"model {path}: its tokenizer has no {image_token}, which stands for images; save the model's "
            "own tokenizer with it"
        )
    if processor.chat_template is None:
        processor.chat_template = getattr(tokenizer, "chat_template", None)
    processor.__dict__["_video_settings"] = _video_settings(path, saved, parts["image_processor"], config)
    return processor


def build_image_processor(config: PreTrainedConfig, path: str | None, max_pixels: int | None = None) -> Any:
    """The image processor of the checkpoint at ``path``, or the family's usual one for this config. ``max_pixels``
    shrinks images that have more, for families that take images of any size.

    Raises:
        ValueError: ``max_pixels`` for a family whose images have fixed sizes, or below the least size; or the
            checkpoint's own cannot be read.
    """
    path = None if path is None else resolve_checkpoint(path)
    image_processor = saved_image_processor(path)
    family = family_of_type(config.model_type)
    if family is not None and not isinstance(loop := family.loop, Lacks):
        image_processor = _fitting(image_processor, loop.image_processor(config), loop.image_processors, path)
    elif image_processor is None:
        raise ValueError(f"model {path}: there is no {IMAGE_FILE} or {PROCESSOR_FILE} with an image processor")
    pinpoints = getattr(config, "image_grid_pinpoints", None)
    if pinpoints is not None and hasattr(image_processor, "image_grid_pinpoints"):
        pinpoints = [list(point) for point in pinpoints]
        if [list(point) for point in image_processor.image_grid_pinpoints] != pinpoints:
            log.warning("%s: image_grid_pinpoints of the image processor differ from the model's, which are used", path)
        image_processor.image_grid_pinpoints = pinpoints
    if max_pixels is not None:
        size = dict(image_processor.size)
        if "longest_edge" not in size:
            raise ValueError(
                f"model.max_pixels={max_pixels} is for models that take images of any size; those of a "
                f"{config.model_type} are fixed: leave it null"
            )
        if max_pixels < size["shortest_edge"]:
            raise ValueError(f"model.max_pixels={max_pixels} is below the least size, {size['shortest_edge']} pixels")
        image_processor.size = {**size, "longest_edge": max_pixels}
    return image_processor


def _fitting(saved: Any, usual: Any, classes: tuple[str, ...] | None, path: str | None) -> Any:
    """The saved image processor where the family can use it, with a warning where it cannot."""
    name = None if saved is None else type(saved).__name__.removesuffix("Pil")
    if saved is not None and (classes is None or name in classes):
        return saved
    if path is not None:
        found = f"its image processor is a {name}" if name else "there is no image processor"
        log.warning("%s: %s; one is built from the model's config, a %s", path, found, type(usual).__name__)
    return usual


def saved_image_processor(path: str | None) -> Any:
    """The image processor of a checkpoint, by PIL; ``None`` if there is none."""
    if "image_processor" not in (read_settings(path, PROCESSOR_FILE) or {}) and read_settings(path, IMAGE_FILE) is None:
        return None
    try:
        return AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"model {path}: its image processor cannot be loaded ({first_line(error)})") from error


def read_settings(path: str | None, name: str, *, offline: bool = False) -> dict[str, Any] | None:
    """A JSON file of a folder or of a repository on the hub (with ``offline``, of its cache alone); ``None`` if it is
    not there.

    Raises:
        ValueError: it is damaged.
    """
    if path is None:
        return None
    file: str | Path | None = Path(path) / name
    if not Path(path).is_dir():
        file = cached_file(
            path,
            name,
            local_files_only=offline,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    return read_json_object(Path(file)) if file is not None and Path(file).is_file() else None


def _processor_settings(path: str | None, saved: dict[str, Any] | None) -> dict[str, Any]:
    """What ``processor_config.json`` and the chat template's file say, without the parts that have their own files."""
    if path is None:
        return {}
    try:
        settings, _ = ProcessorMixin.get_processor_dict(path)
    except (OSError, ValueError) as error:
        if saved is not None or Path(path).is_dir():
            raise ValueError(f"model {path}: its processor's files cannot be read ({first_line(error)})") from error
        return {}
    return {name: value for name, value in settings.items() if name not in ("image_processor", "video_processor")}


def _counting(config: PreTrainedConfig, saved: dict[str, Any] | None, path: str | None) -> dict[str, Any]:
    """The settings that tokens are counted by, from the model's config; says which of them the files lack or differ
    in."""
    family = family_of_type(config.model_type)
    settings = {} if family is None else family.counting(config)
    if path is None:
        return settings
    missing = [f"{key}={value}" for key, value in settings.items() if (saved or {}).get(key) is None]
    other = [
        f"{key}={value} instead of {saved[key]}"
        for key, value in settings.items()
        if saved is not None and saved.get(key) not in (None, value)
    ]
    if missing:
        log.info("%s: the processor lacks settings, taken from the model's config: %s", path, ", ".join(missing))
    if other:
        log.warning("%s: settings of the processor do not fit the model; used are %s", path, ", ".join(other))
    return settings


def _video_settings(
    path: str | None, saved: dict[str, Any] | None, image_processor: Any, config: PreTrainedConfig
) -> dict[str, Any] | None:
    """What transformers' video processor for this checkpoint is made from, in the order in which it looks."""
    if saved is not None and "video_processor" in saved:
        return saved["video_processor"]
    found = read_settings(path, VIDEO_FILE) or read_settings(path, IMAGE_FILE)
    if found is None:
        found = json.loads(image_processor.to_json_string())
    return {name: value for name, value in found.items() if name != "processor_class"}


@cache
def _without_videos(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A processor class that has no video processor, by the same name; the class itself where it has none."""
    attributes = processor_class.get_attributes()
    if "video_processor" not in attributes:
        return processor_class

    class ImagesOnly(processor_class):  # type: ignore[misc, valid-type]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in attributes if name != "video_processor"]

        def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **keywords: Any) -> BatchFeature:
            if videos is not None:
                raise ValueError("videos are not processed here; pass their frames as images")
            return super().__call__(images=images, text=text, **keywords)

        def to_dict(self) -> dict[str, Any]:
            settings = super().to_dict()
            video = self.__dict__.get("_video_settings")
            return settings if video is None else {**settings, "video_processor": video}

        def __reduce__(self) -> Any:  # pickle finds no class that was made in a function
            return _empty, (processor_class,), self.__dict__

    ImagesOnly.__name__ = ImagesOnly.__qualname__ = processor_class.__name__
    return ImagesOnly


def _empty(processor_class: type[ProcessorMixin]) -> ProcessorMixin:
    """An instance whose attributes pickle fills in."""
    made: ProcessorMixin = object.__new__(_without_videos(processor_class))  # type: ignore[arg-type]
    return made
