"""A folder of images as a video."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vtprune_train.data.images import TOO_MANY_FILES, ChangedImage, UnreadableImage, image_size, load_image
from vtprune_train.data.video_errors import ChangedVideo, UnreadableVideo
from vtprune_train.data.video_files import Resize
from vtprune_train.models.families.layout import VideoHeader

SUFFIXES = (".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def folder_header(folder: Path | tuple[Path, ...], *, fps: float, max_pixels: int, name: str) -> VideoHeader:
    """See :func:`~vtprune_train.data.videos.video_header`. Only the first image's size is read."""
    files = _frames(folder, name)
    height, width = _first_size(files, max_pixels, name)
    return VideoHeader(height, width, len(files), float(fps), len(files) / fps)


def folder_frames(
    folder: Path | tuple[Path, ...],
    indices: Sequence[int],
    header: VideoHeader,
    *,
    max_pixels: int,
    name: str,
    resize: Resize | None = None,
) -> np.ndarray:
    """See :func:`~vtprune_train.data.videos.load_frames`. Images of different sizes raise
    :class:`~vtprune_train.data.videos.UnreadableVideo`."""
    files = _frames(folder, name)
    if len(files) != header.frames:
        raise ChangedVideo(name, f"it has {len(files)} frames, but had {header.frames} when its header was read")
    size = (header.height, header.width)
    if (first := _first_size(files, max_pixels, name)) != size:
        raise ChangedVideo(name, f"its first frame is {first}, but was {size} when its header was read")
    frames = np.empty((0, *size, 3), dtype=np.uint8)
    for place, index in enumerate(indices):
        with _frame_errors(name, index, files[index]):
            frame = np.array(load_image(files[index], size, max_pixels=max_pixels))
        frame = frame if resize is None else resize(frame)
        if not len(frames):
            frames = np.empty((len(indices), *frame.shape), dtype=np.uint8)
        frames[place] = frame
    return frames


def _frames(folder: Path | tuple[Path, ...], name: str) -> list[Path]:
    """The images in a folder, in natural order, or the listed ones."""
    if isinstance(folder, tuple):
        return list(folder)
    try:
        files = [file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != "."]
    except OSError as error:
        if error.errno in TOO_MANY_FILES:
            raise
        raise UnreadableVideo(name, error.strerror or str(error)) from error
    if not files:
        raise UnreadableVideo(name, f"a folder without images ({', '.join(SUFFIXES)})")
    return sorted(files, key=lambda file: _natural(file.name))


def _natural(name: str) -> tuple[list[str | int], str]:
    """A sort key that orders digits by their value; odd entries are numbers."""
    return [int(part) if odd % 2 else part for odd, part in enumerate(re.split(r"(\d+)", name))], name


def _first_size(files: Sequence[Path], max_pixels: int, name: str) -> tuple[int, int]:
    with _frame_errors(name, 0, files[0]):
        return image_size(files[0], max_pixels=max_pixels)


@contextmanager
def _frame_errors(name: str, index: int, file: Path) -> Iterator[None]:
    """Convert the error of an image to that of its video."""
    try:
        yield
    except ChangedImage as error:
        reason = f"frame {index} ({file.name}) does not have the size of the first frame"
        raise UnreadableVideo(name, f"{reason}; resize or remove this image") from error
    except UnreadableImage as error:
        raise UnreadableVideo(name, f"frame {index} ({file.name}): {error.reason}") from error
