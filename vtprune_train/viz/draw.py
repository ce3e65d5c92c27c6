"""An image of the visual tokens that survive each stage: one column a stage, one row of panels an image.

Shape suffixes: V visual tokens of one image, K of them that remain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vtprune_train.models.families.places import Places

PANEL = (360, 400)  # most pixels of a panel: width, height
STRIP = 10  # width of the marks of newline tokens, right of the grid
MARGIN, GAP, LINE = 28, 24, 22
PAPER, INK, SOFT, RULE = "#ffffff", "#1d2433", "#667085", "#d5dae3"
DROPPED = (58, 67, 84)  # what dropped tokens fade to
NEWLINE_KEPT, NEWLINE_DROPPED = "#0f9d8a", "#d5dae3"
FADE = 0.8


@dataclass(frozen=True)
class ShownImage:
    """One image and what became of its tokens.

    Args:
        picture: RGB, as the model's processor was given it.
        places: of its V visual tokens.
        kept: for each stage, [K] int64 indices of the tokens present in it; ``kept[0]`` holds all V.

    Raises:
        ValueError: the image is of another size than its places, or a token does not exist.
    """

    image: Image.Image
    places: Places
    kept: Sequence[np.ndarray]

    def __post_init__(self) -> None:
        height, width = self.places.size
        if self.image.size != (width, height):
            raise ValueError(f"the picture is {self.image.size}, but its tokens were placed on {(width, height)}")
        total = len(self.places.kinds)
        if any(len(tokens) and not 0 <= tokens.min() <= tokens.max() < total for tokens in self.kept):
            raise ValueError(f"a kept token lies outside the {total} tokens of its image")

    def panels(self) -> list[str]:
        """The kinds that get a panel of their own; newlines stand beside the grid."""
        counts = self.places.counts(self.kept[0])
        return [kind for kind in ("base", "grid") if counts.get(kind) or (kind == "grid" and counts.get("newline"))]

    def totals(self, stage: int) -> str:
        """For example ``288 of 576 tokens (50%)``."""
        kept, total = len(self.kept[stage]), len(self.kept[0])
        return f"{kept} of {total} tokens ({100 * kept / total:.3g}%)"


def draw(images: Sequence[ShownImage], stages: Sequence[str], title: str = "") -> Image.Image:
    """The whole image.

    Args:
        images: drawn below one another, each with a panel for its base tile and one for its grid.
        stages: headings of the columns, one for each entry of every image's ``kept``.
        title: for example the prompt, above everything.

    Raises:
        ValueError: no image, or an image without exactly one set of tokens a stage.
    """
    if not images:
        raise ValueError("there is no image to draw tokens of; give at least one")
    for shown in images:
        if len(shown.kept) != len(stages):
            raise ValueError(f"an image has tokens of {len(shown.kept)} stages, but {len(stages)} stages are named")
    width = 2 * MARGIN + len(stages) * (PANEL[0] + STRIP + 4) + (len(stages) - 1) * GAP
    lines = _wrapped(title, width - 2 * MARGIN)
    top = MARGIN + len(lines) * 28 + (12 if lines else 0)
    blocks = [_block_height(shown) for shown in images]
    canvas = Image.new("RGB", (width, top + 44 + sum(blocks) + GAP * (len(blocks) - 1) + MARGIN), PAPER)
    pen = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        pen.text((MARGIN, MARGIN + 28 * number), line, INK, _font(20, bold=True))
    for column, heading in enumerate(stages):
        left = MARGIN + column * (PANEL[0] + STRIP + 4 + GAP)
        pen.text((left, top), heading, INK, _font(16, bold=True))
        below = top + 30
        for number, (shown, height) in enumerate(zip(images, blocks, strict=True), start=1):
            name = f"picture {number}: " if len(images) > 1 else ""
            pen.text((left, below), name + shown.totals(column), SOFT, _font(14))
            _draw_panels(canvas, shown, column, left, below + LINE)
            below += height + GAP
    return canvas


def panel(shown: ShownImage, stage: int, kind: str, size: tuple[int, int]) -> Image.Image:
    """The image at ``size`` (width, height) with everything faded but the tokens of ``kind`` present in ``stage``."""
    width, height = size
    tokens = shown.kept[stage]
    boxes = shown.places.boxes[tokens[shown.places.kinds[tokens] == kind]]
    rows, columns = shown.places.size
    edges = np.rint(boxes * np.array([width / columns, height / rows] * 2)).astype(np.int64)
    is_kept = np.zeros((height, width), dtype=bool)
    for left, top, right, bottom in edges.tolist():
        is_kept[top:bottom, left:right] = True
    pixels = np.asarray(shown.image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    grey = pixels.mean(axis=-1, keepdims=True)
    faded = (1 - FADE) * grey + FADE * np.array(DROPPED)
    return Image.fromarray(np.where(is_kept[..., None], pixels, faded).astype(np.uint8))


def panel_size(shown: ShownImage) -> tuple[int, int]:
    """Pixels (width, height) of an image's panels."""
    height, width = shown.places.size
    scale = min(PANEL[0] / width, PANEL[1] / height)
    return max(8, round(width * scale)), max(8, round(height * scale))


def _block_height(shown: ShownImage) -> int:
    return LINE + len(shown.panels()) * (panel_size(shown)[1] + LINE + 10)


def _draw_panels(canvas: Image.Image, shown: ShownImage, stage: int, left: int, y: int) -> None:
    """One image at one stage: below one another a panel for each kind, with its counts."""
    pen = ImageDraw.Draw(canvas)
    total, kept = shown.places.counts(shown.kept[0]), shown.places.counts(shown.kept[stage])
    size = panel_size(shown)
    for kind in shown.panels():
        pen.rectangle((left - 1, y - 1, left + size[0], y + size[1]), outline=RULE)
        canvas.paste(panel(shown, stage, kind, size), (left, y))
        pen.text((left, y + size[1] + 5), f"{kind} {kept.get(kind, 0)} of {total.get(kind, 0)}", INK, _font(13))
        if kind == "grid" and "newline" in total:
            _draw_newlines(pen, shown, stage, (left + size[0] + 4, y))
            words = f"newline {kept['newline']} of {total['newline']}"
            pen.text((left + PANEL[0] + STRIP + 4, y + size[1] + 5), words, NEWLINE_KEPT, _font(13), anchor="ra")
        y += size[1] + LINE + 10


def _draw_newlines(pen: ImageDraw.ImageDraw, shown: ShownImage, stage: int, corner: tuple[int, int]) -> None:
    """A strip with one mark for each row's newline token."""
    left, top = corner
    scale = panel_size(shown)[1] / shown.places.size[0]
    kept = set(shown.kept[stage].tolist())
    for token in np.flatnonzero(shown.places.kinds == "newline").tolist():
        above, below = np.rint(shown.places.boxes[token, 1::2] * scale).astype(int).tolist()
        last = max(above, below - 2)  # a pixel of paper between marks, where there is room
        fill = NEWLINE_KEPT if token in kept else NEWLINE_DROPPED
        pen.rectangle((left, top + above, left + STRIP - 1, top + last), fill)


def _wrapped(text: str, width: int) -> list[str]:
    """``text`` in lines of at most ``width`` pixels, as the title is set."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _font(20, bold=True).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings."""
    import matplotlib  # training goes on without it

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
