"""Reads the header of a video, and single frames as 8-bit RGB, from a video file or a folder of images. Any unusable
video raises one error class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import TypeGuard

import numpy as np

from vtprune_train.data.frame_folders import folder_frames, folder_header
from vtprune_train.data.images import MAX_PIXELS
from vtprune_train.data.video_errors import ChangedVideo, UnreadableVideo
from vtprune_train.data.video_files import file_frames, file_header
from vtprune_train.models.families.layout import VideoHeader

__all__ = ["FPS", "ChangedVideo", "UnreadableVideo", "is_video_name", "load_frames", "video_header"]

Source = Path | bytes | tuple[Path, ...]
"""A video file, its content, a folder of images, or the images."""
FPS = 24.0  # transformers' default for frames without a rate
SUFFIXES = {
    *(".3gp", ".apng", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
    *(".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
}


def video_header(
    source: Source, *, fps: float = FPS, max_pixels: int = MAX_PIXELS, name: str | None = None
) -> VideoHeader:
    """Frame size, number of frames, and frame rate of a video.

    MP4 and MOV files have an index of their frames. Other files are read to the end to count the frames, without
    decoding them. Of any file only the first frame is decoded, since PyAV reports the rotation of decoded frames only.

    Args:
        source: a video file, its content, a folder of images, which are sorted naturally (2 before 10), or the images.
        fps: frames per second of a folder of images, or of a file that does not contain times.
        max_pixels: limit of ``height * width`` of a frame.
        name: the video's name in messages; the path if ``None``.

    Raises:
        UnreadableVideo: the video cannot be read.
    """
    name = name or _name(source)
    if isinstance(source, tuple) or _is_folder(source):
        return folder_header(source, fps=fps, max_pixels=max_pixels, name=name)
    return file_header(source, fps=fps, max_pixels=max_pixels, name=name)


def load_frames(
    source: Source,
    indices: Sequence[int],
    header: VideoHeader,
    *,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> np.ndarray:
    """Decode frames of a video, [n, height, width, 3] uint8 RGB, with rotation applied. Pixels are left as they are
    stored if they are not square.

    Decoding starts at the keyframe before each frame and stops after the last one, on one thread. Pixels equal those of
    ``ffmpeg -pix_fmt rgb24`` bit by bit.

    Args:
        source, max_pixels, name: see :func:`video_header`.
        indices: indices of the frames in presentation order, in any order; they may repeat.
        header: the video's header in the index.

    Raises:
        UnreadableVideo: a frame cannot be decoded, or the file is truncated.
        ChangedVideo: the video does not match ``header``.
        IndexError: an index is negative, or not less than ``header.frames``.
    """
    name = name or _name(source)
    for index in indices:
        if not 0 <= index < header.frames:
            raise IndexError(f"{name}: frame {index} of a video with {header.frames} frames")
    if isinstance(source, tuple) or _is_folder(source):
        return folder_frames(source, indices, header, max_pixels=max_pixels, name=name)
    return file_frames(source, indices, header, max_pixels=max_pixels, name=name)


def is_video_name(name: str) -> bool:
    """Whether a file name ends like that of a video or an animation."""
    return PurePath(name).suffix.lower() in SUFFIXES


def _is_folder(source: Path | bytes) -> TypeGuard[Path]:
    return isinstance(source, Path) and os.path.isdir(source)  # noqa: PTH112 (Path.is_dir raises for a long name)


def _name(source: Source) -> str:
    if isinstance(source, tuple):
        return f"{source[0]} and {len(source) - 1} more"
    return f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
