"""Builds the processor of a model (image processor, tokenizer, settings), the same in training and inference.

It is built from its parts, because transformers' ``AutoProcessor`` also builds a video processor for some families,
which requires torchvision; here :class:`~vtprune_train.models.io.video_processor.VideoProcessor` replaces it. Images
are always processed by the PIL backend, even if torchvision is installed, so that inference uses the same pixels as
training. The settings of videos are saved with the processor, where ``AutoProcessor`` finds them.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # exported only with torchvision in 5.17
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from transformers.utils import cached_file

from vtprune_train.files.parse import read_json_object
from vtprune_train.models.families import family_of_type
from vtprune_train.models.families.base import Lacks
from vtprune_train.models.families.llava_next_video import NextVideo
from vtprune_train.models.io.build import first_line, resolve_checkpoint
from vtprune_train.models.io.video_processor import VideoProcessor

log = logging.getLogger(__name__)

IMAGE_FILE, VIDEO_FILE, PROCESSOR_FILE = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)


def open_processor(folder: str, config: PreTrainedConfig) -> Any:
    """The processor of a model in a Hugging Face folder or on the hub.

    Raises:
        ValueError: there is no readable tokenizer, it has no image token, or a file of the processor is damaged.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {folder}: its tokenizer cannot be loaded ({first_line(error)})") from error
    return build_processor(config, tokenizer, folder)


def build_processor(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    path: str | None = None,
    max_pixels: int | None = None,
    video: Mapping[str, Any] | None = None,
) -> Any:
    """The processor of a model.

    Settings that determine the number of visual tokens (``patch_size``, ``vision_feature_select_strategy``,
    ``num_additional_image_tokens``, ...) come from the model's config: checkpoints of old versions of transformers lack
    them, and the model would refuse other token counts.

    Args:
        config: the model's config.
        tokenizer: the model's tokenizer.
        path: the model's checkpoint, whose other settings are used.
        max_pixels: see :func:`build_image_processor`.
        video: the settings of a run with videos, see :func:`~vtprune_train.models.families.videos.video_settings`; they
            are saved with the processor.

    Raises:
        ValueError: a file of the processor is damaged, or the tokenizer lacks a token that the processor needs.
    """
    path = None if path is None else resolve_checkpoint(path)
    saved = read_settings(path, PROCESSOR_FILE)
    settings = {**_processor_settings(path, saved), **_counting(config, saved, path)}
    named = processor_class_from_name(name) if (name := (saved or {}).get("processor_class")) else None
    processor_class = _without_torchvision(named or PROCESSOR_MAPPING[type(config)])  # type: ignore[arg-type]
    parts = {"image_processor": build_image_processor(config, path, max_pixels), "tokenizer": tokenizer}
    try:
        processor = processor_class.from_args_and_dict([], settings, **parts)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"cannot build a {processor_class.__name__} from the files in {path} ({first_line(error)}); use the "
            f"tokenizer and the processor files of this {config.model_type} checkpoint"
        ) from error
    for name in ("get_attributes", "video_processor"):
        processor.__dict__.pop(name, None)
    image_token = getattr(processor, "image_token", None)
    if image_token is not None and image_token not in tokenizer.get_vocab():
        raise ValueError(
            f"model {path}: its tokenizer has no image token {image_token}; save the model's original tokenizer with it"
        )
    if processor.chat_template is None:
        processor.chat_template = getattr(tokenizer, "chat_template", None)
    settings = saved_video_settings(path, parts["image_processor"])
    processor.__dict__["_video_settings"] = settings
    if _takes_videos(config):
        place = f"model {path or config.model_type}"
        processor.video_processor = VideoProcessor(config, parts["image_processor"], settings, video, place)
    return processor


def _takes_videos(config: PreTrainedConfig) -> bool:
    family = family_of_type(config.model_type)
    return family is not None and not isinstance(family.loop, Lacks) and not isinstance(family.loop.videos, Lacks)


def build_image_processor(config: PreTrainedConfig, path: str | None, max_pixels: int | None = None) -> Any:
    """The image processor of the checkpoint at ``path``, or the family's default for this config. Images of more than
    ``max_pixels`` are downsized, in families that support images of any size.

    Raises:
        ValueError: ``max_pixels`` is set for a family with fixed image sizes or is below the smallest size; or the
            checkpoint's image processor cannot be read.
    """
    path = None if path is None else resolve_checkpoint(path)
    image_processor = saved_image_processor(path)
    family = family_of_type(config.model_type)
    if family is not None and not isinstance(loop := family.loop, Lacks):
        image_processor = _fitting(image_processor, loop.image_processor(config), loop.image_processors, path)
    elif image_processor is None:
        raise ValueError(f"model {path}: there is no {IMAGE_FILE} or {PROCESSOR_FILE} with an image processor")
    for name, value in ({} if family is None else family.image_settings).items():
        setattr(image_processor, name, value)
    pinpoints = getattr(config, "image_grid_pinpoints", None)
    if pinpoints is not None and hasattr(image_processor, "image_grid_pinpoints"):
        pinpoints = [list(point) for point in pinpoints]
        if [list(point) for point in image_processor.image_grid_pinpoints] != pinpoints:
            log.warning("%s: image_grid_pinpoints of image processor and model differ; using the model's", path)
        image_processor.image_grid_pinpoints = pinpoints
    if max_pixels is not None:
        size = dict(image_processor.size)
        if "longest_edge" not in size:
            raise ValueError(
                f"model.max_pixels={max_pixels} is for models that support images of any size; a {config.model_type} "
                "has fixed image sizes: set it to null"
            )
        if max_pixels < size["shortest_edge"]:
            raise ValueError(
                f"model.max_pixels={max_pixels} is below the smallest size, {size['shortest_edge']} pixels"
            )
        image_processor.size = {**size, "longest_edge": max_pixels}
    return image_processor


def _fitting(saved: Any, default: Any, classes: tuple[str, ...] | None, path: str | None) -> Any:
    """The saved image processor if the family supports it; otherwise the ``default`` one, with a warning."""
    name = None if saved is None else type(saved).__name__.removesuffix("Pil")
    if saved is not None and (classes is None or name in classes):
        return saved
    if path is not None:
        reason = f"its image processor is a {name}" if name else "it has no image processor"
        log.warning("%s: %s; using a %s built from the model's config", path, reason, type(default).__name__)
    return default


def saved_image_processor(path: str | None) -> Any:
    """The image processor of a checkpoint with the PIL backend; ``None`` if there is none."""
    if "image_processor" not in (read_settings(path, PROCESSOR_FILE) or {}) and read_settings(path, IMAGE_FILE) is None:
        return None
    try:
        return AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"model {path}: its image processor cannot be loaded ({first_line(error)})") from error


def read_settings(path: str | None, name: str, *, offline: bool = False) -> dict[str, Any] | None:
    """Read a JSON file of a folder or of a repository on the hub (with ``offline``, only from the cache); ``None`` if
    it does not exist.

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


def processor_chat_template(path: str, *, offline: bool = False) -> str | None:
    """The chat template saved with a processor, in a folder or on the hub (with ``offline``, only from the cache);
    ``None`` without one."""
    try:
        settings, _ = ProcessorMixin.get_processor_dict(path, local_files_only=offline)
    except OSError as error:
        log.debug("%s has no readable processor: %s", path, error)
        return None
    source = settings.get("chat_template")
    return source.get("default") if isinstance(source, dict) else source


def _processor_settings(path: str | None, saved: dict[str, Any] | None) -> dict[str, Any]:
    """Settings of ``processor_config.json`` and of the chat template's file, without parts that have their own
    files."""
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
    """The settings that determine token counts, from the model's config; logs those that the files lack or that
    differ."""
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
        log.info(
            "%s: settings missing in the processor are taken from the model's config: %s", path, ", ".join(missing)
        )
    if other:
        log.warning("%s: settings of the processor do not fit the model; using %s", path, ", ".join(other))
    return settings


def saved_video_settings(path: str | None, image_processor: Any) -> dict[str, Any]:
    """Settings of the video processor of the checkpoint at ``path``, looked up in the same order as in transformers;
    those of the ``image_processor`` if it has none."""
    saved = read_settings(path, PROCESSOR_FILE)
    if saved is not None and "video_processor" in saved:
        return dict(saved["video_processor"])
    settings = read_settings(path, VIDEO_FILE) or read_settings(path, IMAGE_FILE)
    if settings is None:
        settings = json.loads(image_processor.to_json_string())
    return {name: value for name, value in settings.items() if name != "processor_class"}


@functools.cache
def _without_torchvision(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A processor class of the same name that is built without transformers' video processor; ``processor_class``
    itself if it has none."""
    attributes = processor_class.get_attributes()
    if "video_processor" not in attributes:
        return processor_class

    class WithoutTorchvision(processor_class):  # type: ignore[misc, valid-type]
        def __new__(cls, *_: Any, **__: Any) -> Any:
            made = super().__new__(cls)
            made.__dict__["get_attributes"] = lambda: attributes  # __init__ passes all parts by position
            return made

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in attributes if name != "video_processor"]

        def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **keywords: Any) -> BatchFeature:
            if videos is not None and not hasattr(self, "video_processor"):
                raise ValueError("this model does not take videos; pass their frames as images")
            return super().__call__(images=images, text=text, videos=videos, **keywords)

        def replace_video_token(self, video_inputs: Any = None, video_idx: int = 0, **keywords: Any) -> str:
            layout = self.video_processor.layout
            if not isinstance(layout, NextVideo):  # its processor in transformers assumes spatial_pool_stride=2
                return str(super().replace_video_token(video_inputs, video_idx, **keywords))
            frames = len(video_inputs["pixel_values_videos"][video_idx])
            return str(self.video_token) * (frames * layout.frame_side**2)

        def to_dict(self) -> dict[str, Any]:
            settings = super().to_dict()
            own = self.__dict__.get("video_processor")
            video = self.__dict__.get("_video_settings") if own is None else own.to_dict()
            return settings if video is None else {**settings, "video_processor": video}

        def __reduce__(self) -> Any:  # pickle cannot find a class that was defined in a function
            return _empty, (processor_class,), self.__dict__

    WithoutTorchvision.__name__ = WithoutTorchvision.__qualname__ = processor_class.__name__
    return WithoutTorchvision


def _empty(processor_class: type[ProcessorMixin]) -> ProcessorMixin:
    """An empty instance, for unpickling."""
    made: ProcessorMixin = object.__new__(_without_torchvision(processor_class))  # type: ignore[arg-type]
    return made
