"""Opens videos for a model's processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from vtprune_train.data.images import UNREADABLE
from vtprune_train.data.videos import is_video_name
from vtprune_train.data.visuals import VisualFile
from vtprune_train.models.io.video_processor import DecodedVideo, VideoProcessor


def video_processor(processor: Any, what: str = "a prompt with a video") -> VideoProcessor:
    """The part of a model's processor that prepares videos.

    Args:
        processor: see :func:`vtprune_train.evaluation.answering.load_processor`.
        what: the user of the processor, for the error message.

    Raises:
        ValueError: the model's family does not take videos.
    """
    videos = getattr(processor, "video_processor", None)
    if not isinstance(videos, VideoProcessor):
        family = type(processor).__name__.removesuffix("Processor")
        raise ValueError(f"{what}: {family} models do not take videos here; pass the frames as images")
    return videos


def open_video(source: Path | VisualFile, processor: Any) -> DecodedVideo:
    """Decode the frames of a video that are sampled with the model's settings.

    Args:
        source: a video file, a folder of frames, or a video of a record.
        processor: the model's processor.

    Raises:
        ValueError: the model's family does not take videos, or the video cannot be read.
    """
    file = source if isinstance(source, VisualFile) else VisualFile(str(source), source, is_video=True)
    videos = video_processor(processor, f"video {file.name}")
    if isinstance(file.source, Path) and not is_video_name(file.source.name) and _is_still(file.source):
        raise ValueError(f"video {file.name} is an image; pass it as an image (--image)")
    try:
        clip = file.visual(videos.layout)
        return DecodedVideo(clip, file.load(clip))  # type: ignore[arg-type]
    except UNREADABLE as error:
        raise ValueError(f"video {file.name} cannot be read ({error.reason})") from error


def _is_still(path: Path) -> bool:
    """Whether a file is an image without animation."""
    if not path.is_file():
        return False
    try:
        with Image.open(path) as image:
            return not getattr(image, "is_animated", False)
    except (UnidentifiedImageError, OSError):
        return False
