"""Reads the header and selected frames (8-bit RGB) of a video file or a folder of images. Every unusable video raises
:class:`UnreadableVideo`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import TypeGuard

import numpy as np

from vtprune_train.data.frame_folders import folder_frames, folder_header
from vtprune_train.data.images import MAX_PIXELS
from vtprune_train.data.video_errors import ChangedVideo, UnreadableVideo
from vtprune_train.data.video_files import Resize, file_frames, file_header
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
    source: Source, *, fps: float = FPS, max_pixels: int = MAX_PIXELS, name: str | None = None, times: bool = False
) -> VideoHeader:
    """Frame size, number of frames, and frame rate of a video.

    MP4 and MOV files have an index of their frames. Other files are read to the end to count the frames, without
    decoding them. Only the first frame is decoded, because PyAV reports the rotation only for decoded frames.

    Args:
        source: a video file, its content, a folder of images, which are sorted naturally (2 before 10), or the images.
        fps: frames per second of a folder of images, or of a file that does not contain times.
        max_pixels: limit of ``height * width`` of a frame.
        name: the video's name in messages; the path if ``None``.
        times: also read the time of each frame if their rate is not constant, as parts of a video need it.

    Raises:
        UnreadableVideo: the video cannot be read.
    """
    name = name or _name(source)
    if isinstance(source, tuple) or _is_folder(source):
        return folder_header(source, fps=fps, max_pixels=max_pixels, name=name)
    return file_header(source, fps=fps, max_pixels=max_pixels, name=name, times=times)


def load_frames(
    source: Source,
    indices: Sequence[int],
    header: VideoHeader,
    *,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
    resize: Resize | None = None,
) -> np.ndarray:
    """Decode frames of a video, [n, height, width, 3] uint8 RGB, with rotation applied. Frames with pixels that are not
    square are not rescaled.

    Decoding starts at the keyframe before each frame and stops after the last one, on one thread. Pixels are
    bit-identical to those of ``ffmpeg -pix_fmt rgb24``.

    Args:
        source, max_pixels, name: see :func:`video_header`.
        indices: indices of the frames in presentation order, in any order; they may repeat.
        header: the video's header.
        resize: applied to each decoded frame, so that not all frames of a long video are in memory at full size.

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
        return folder_frames(source, indices, header, max_pixels=max_pixels, name=name, resize=resize)
    return file_frames(source, indices, header, max_pixels=max_pixels, name=name, resize=resize)


def is_video_name(name: str) -> bool:
    """Whether a file name ends like that of a video or an animation."""
    return PurePath(name).suffix.lower() in SUFFIXES


def _is_folder(source: Path | bytes) -> TypeGuard[Path]:
    return isinstance(source, Path) and os.path.isdir(source)  # noqa: PTH112 (Path.is_dir raises for a long name)


def _name(source: Source) -> str:
    if isinstance(source, tuple):
        return f"{source[0]} and {len(source) - 1} more"
    return f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
