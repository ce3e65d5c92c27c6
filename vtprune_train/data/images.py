"""Reads the size of an image from its header, and its pixels as 8-bit RGB. Any unusable file raises one error class.

docs/data_format.md has a table of how each kind of image is handled.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, ClassVar

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

MAX_PIXELS = 89_478_485  # Pillow's default: a quarter of a gigabyte in RGB
BACKGROUND = "white"
TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)  # errors of this process, not of the image
WORD_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(ValueError):  # noqa: N818 (a public name)
    """Raised for an image that cannot be used; the message is ``name: reason``."""

    kind: ClassVar[str] = "image"

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class ChangedImage(UnreadableImage):
    """Raised for an image whose size differs from its size in the index."""


UNREADABLE = (UnreadableImage,)


def image_size(source: Path | bytes, *, max_pixels: int = MAX_PIXELS, name: str | None = None) -> tuple[int, int]:
    """``(height, width)`` of an image in pixels, after EXIF rotation, without decoding it.

    Args:
        source: a file, or its content.
        max_pixels: limit of ``height * width``.
        name: the image's name in messages; the path if ``None``.

    Raises:
        UnreadableImage: the image cannot be read.
    """
    name = name or _name(source)
    with _reading(name, max_pixels), _open(source, name) as image:
        (width, height), is_rotated = image.size, _orientation(image) >= 5
    return (width, height) if is_rotated else (height, width)


def load_image(
    source: Path | bytes, expected_size: tuple[int, int], *, max_pixels: int = MAX_PIXELS, name: str | None = None
) -> Image.Image:
    """Decode an image (the first frame of an animation) to 8-bit RGB, with EXIF rotation applied and transparency
    composited over white.

    Args:
        source, max_pixels, name: see :func:`image_size`.
        expected_size: ``(height, width)`` of the image in the index.

    Raises:
        UnreadableImage: the image cannot be decoded.
        ChangedImage: its size is not ``expected_size``.
    """
    name = name or _name(source)
    with _reading(name, max_pixels), _open(source, name) as image:
        orientation = _orientation(image)
        image.load()
    decoded: Image.Image = image
    if orientation in TURNS:
        decoded = image.transpose(TURNS[orientation])
        decoded.format = image.format
    if (decoded.height, decoded.width) != tuple(expected_size):
        size = f"{decoded.height} x {decoded.width}"
        raise ChangedImage(name, f"it is {size}, but was {tuple(expected_size)} when the data was indexed")
    return _rgb(decoded, name)


def _name(source: Path | bytes) -> str:
    return f"{len(source)} bytes" if isinstance(source, bytes) else str(source)


@contextmanager
def _reading(name: str, max_pixels: int) -> Iterator[None]:
    """Convert any exception that Pillow raises for a broken file to :class:`UnreadableImage`. Only code that reads an
    image belongs in this context, so that other errors are not converted."""
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = max_pixels, False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow raises only at twice the limit
            yield
    except UnreadableImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(name, f"more pixels than data.max_image_pixels={max_pixels} ({error})") from error
    except OSError as error:
        if error.errno in TOO_MANY_FILES:
            raise
        raise UnreadableImage(name, error.strerror or str(error)) from error
    except Exception as error:
        raise UnreadableImage(name, f"broken ({type(error).__name__}: {error})") from error
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


@contextmanager
def _open(source: Path | bytes, name: str) -> Iterator[ImageFile.ImageFile]:
    """Open an image and read its header; closes ``source`` at the end."""
    if isinstance(source, Path) and not stat.S_ISREG((mode := source.stat()).st_mode):  # opening a pipe would hang
        raise UnreadableImage(name, os.strerror(errno.EISDIR) if stat.S_ISDIR(mode.st_mode) else "not a regular file")
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        try:
            image = Image.open(file)
        except UnidentifiedImageError as error:
            raise UnreadableImage(name, _why_unknown(file)) from error
        with image:
            yield image


def _why_unknown(file: IO[bytes]) -> str:
    file.seek(0)
    begin = file.read(32)
    if not begin:
        return "the file is empty"
    if begin[4:8] == b"ftyp" and begin[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "HEIC, which Pillow cannot read; convert it to JPEG or PNG"
    if begin[4:8] == b"ftyp" or begin[:4] == b"\x1aE\xdf\xa3":
        return "a video, not an image; write it as a video"
    return f"not an image that Pillow can read (it starts with {begin[:16]!r})"


def _orientation(image: ImageFile.ImageFile) -> int:
    """EXIF orientation, 1 to 8, from the data before the pixels; 1 if EXIF is missing or damaged.

    Pillow applies the orientation of TIFF itself. Its PNG reader would decode the whole image to look for EXIF data
    after the pixels.
    """
    if image.format == "TIFF":
        return 1
    try:
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged header may raise any exception
        return 1
    return orientation if orientation in TURNS else 1


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert a decoded image of any mode that Pillow supports to 8-bit RGB."""
    if image.mode in (*WORD_MODES, "I", "F"):
        return Image.fromarray(_eight_bits(image, name)).convert("RGB")
    try:
        if not image.has_transparency_data:
            return image.convert("RGB")
        rgba = image.convert("RGBA")
    except (ValueError, ImportError) as error:
        raise UnreadableImage(name, f"its mode {image.mode} cannot be converted to RGB ({error})") from error
    return Image.alpha_composite(Image.new("RGBA", rgba.size, BACKGROUND), rgba).convert("RGB")


def _eight_bits(image: Image.Image, name: str) -> np.ndarray:
    """Convert a grayscale image with more than 8 bits to [H, W] uint8 (Pillow's conversion clips values to white).

    16-bit values keep their scale. The scale of 32-bit values is unknown: white is the smallest of 1 (floats), 255 and
    65535 that no value exceeds. If all are exceeded, or a value is negative, values are scaled by their range.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise UnreadableImage(name, "some of its values are not finite")
    if image.mode in WORD_MODES or (image.mode == "I" and image.format in ("PNG", "PPM")):
        black, white = 0.0, 65535.0
    else:
        black, white = float(values.min()), float(values.max())
        scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        fitting = [scale for scale in scales if scale >= white and black >= 0]
        black, white = (0.0, fitting[0]) if fitting else (black, white)
    return np.rint((values - black) * (255 / max(white - black, 1e-30))).clip(0, 255).astype(np.uint8)
