"""Pictures: their size from the header alone, and their pixels as 8-bit RGB. Hostile and odd files end in one error.

docs/data_format.md has a table of what becomes of each kind.
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
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

MAX_PIXELS = 89_478_485  # Pillow's own: a quarter of a gigabyte in RGB
BACKGROUND = "white"
OURS = (errno.EMFILE, errno.ENFILE)  # this process has too many files open: no fault of the image
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


class UnreadableImage(ValueError):  # noqa: N818 (it is what a caller catches by name)
    """An image that cannot be used; the message is ``name: reason``."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class ChangedImage(UnreadableImage):
    """An image whose size is not the one that it was planned with."""


UNREADABLE = (UnreadableImage,)


def image_size(source: Path | bytes, *, max_pixels: int = MAX_PIXELS, name: str | None = None) -> tuple[int, int]:
    """``(height, width)`` in pixels as the image is meant to be seen (EXIF rotation applied), without decoding it.

    Args:
        source: a file, or its content.
        max_pixels: refuse an image of more.
        name: in messages; the path, if ``None``.

    Raises:
        UnreadableImage: it cannot be read.
    """
    name = name or _name(source)
    with _reading(name, max_pixels), _open(source, name) as image:
        (width, height), turned = image.size, _orientation(image) >= 5
    return (width, height) if turned else (height, width)


def load_image(
    source: Path | bytes, expected_size: tuple[int, int], *, max_pixels: int = MAX_PIXELS, name: str | None = None
) -> Image.Image:
    """The image (of an animation the first) in 8-bit RGB, EXIF rotation applied, transparency over white.

    Args:
        source, max_pixels, name: see :func:`image_size`.
        expected_size: its ``(height, width)`` when the data was indexed.

    Raises:
        UnreadableImage: it cannot be decoded.
        ChangedImage: it is not of ``expected_size``.
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
    """Whatever Pillow raises on a broken file (its formats raise nearly every exception there is) becomes
    :class:`UnreadableImage`. Only reading stands inside, so that errors of our own code stay what they are."""
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = max_pixels, False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow's error comes at twice the limit
            yield
    except UnreadableImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(name, f"more pixels than data.max_image_pixels={max_pixels} ({error})") from error
    except OSError as error:
        if error.errno in OURS:
            raise
        raise UnreadableImage(name, error.strerror or str(error)) from error
    except Exception as error:
        raise UnreadableImage(name, f"broken ({type(error).__name__}: {error})") from error
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


@contextmanager
def _open(source: Path | bytes, name: str) -> Iterator[ImageFile.ImageFile]:
    """The image with its header read; ``source`` is closed again."""
    if isinstance(source, Path) and not stat.S_ISREG((mode := source.stat()).st_mode):  # a pipe would never open
        raise UnreadableImage(name, os.strerror(errno.EISDIR) if stat.S_ISDIR(mode.st_mode) else "no regular file")
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
    return f"no picture that Pillow can read (it begins with {begin[:16]!r})"


def _orientation(image: ImageFile.ImageFile) -> int:
    """EXIF orientation, 1 ... 8, from what stands in front of the pixels; 1 where EXIF is missing or damaged.

    Pillow turns TIFF by itself. Its PNG reader would decode the whole image to look after the pixels too.
    """
    if image.format == "TIFF":
        return 1
    try:
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # as in reading: a damaged header raises anything
        return 1
    return orientation if orientation in TURNS else 1


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """8-bit RGB of a decoded image of any mode that this Pillow can convert."""
    if image.mode in (*WORD_MODES, "I", "F"):
        return Image.fromarray(_eight_bits(image, name)).convert("RGB")
    try:
        if not image.has_transparency_data:
            return image.convert("RGB")
        seen = image.convert("RGBA")
    except (ValueError, ImportError) as error:
        raise UnreadableImage(name, f"its colours ({image.mode}) cannot be read as RGB ({error})") from error
    return Image.alpha_composite(Image.new("RGBA", seen.size, BACKGROUND), seen).convert("RGB")


def _eight_bits(image: Image.Image, name: str) -> np.ndarray:
    """[H, W] uint8 of a grey image with more than 8 bits (Pillow's own conversion clips them to white).

    16 bits keep their scale. 32 bits do not tell theirs: the least of 1 (floats), 255 and 65535 that holds all values
    is white; where none does, or some are negative, the least value is black and the greatest white.
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
