"""Pictures: their size from the header alone, and their pixels as RGB."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageOps

EXIF_ORIENTATION = 0x0112
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def image_size(source: Path | bytes) -> tuple[int, int]:
    """``(height, width)`` in pixels as the picture is meant to be seen (EXIF rotation applied), without decoding it.

    Raises:
        OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError: no readable picture (``UNREADABLE``).
    """
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        width, height = image.size
        rotated = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
    return (width, height) if rotated else (height, width)


def load_image(source: Path | bytes, expected_size: tuple[int, int]) -> Image.Image:
    """The picture in RGB, EXIF rotation applied.

    Raises:
        the errors of :func:`image_size`, also where the picture is no longer of ``expected_size`` (height, width).
    """
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        rgb = ImageOps.exif_transpose(image).convert("RGB")
    if (rgb.height, rgb.width) != tuple(expected_size):
        raise ValueError(
            f"it is {rgb.height} x {rgb.width}, but was {tuple(expected_size)} when the data was "
            "indexed; remove the index (data.cache_dir) to measure it again"
        )
    return rgb
