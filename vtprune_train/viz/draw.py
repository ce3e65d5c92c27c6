"""Draws the visual tokens that are kept at each stage: one column per stage, one row of panels per image.

Shape suffixes: V visual tokens of one image, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vtprune_train.models.families.places import Places

PANEL = (360, 400)  # maximum width and height of a panel
STRIP = 10  # width of the marks of newline tokens, to the right of the grid
MARGIN, GAP, LINE = 28, 24, 22
PAPER, INK, SOFT, RULE = "#ffffff", "#1d2433", "#667085", "#d5dae3"
DROPPED = (58, 67, 84)  # color that dropped tokens fade to
NEWLINE_KEPT, NEWLINE_DROPPED = "#0f9d8a", "#d5dae3"
FADE = 0.8


@dataclass(frozen=True)
class ImageStages:
    """One image and its kept tokens at each stage.

    Args:
        image: the RGB input of the model's processor.
        places: positions of its V visual tokens.
        kept: for each stage, [K] int64 indices of its tokens; ``kept[0]`` has all V.

    Raises:
        ValueError: the image and its places differ in size, or a token does not exist.
    """

    image: Image.Image
    places: Places
    kept: Sequence[np.ndarray]

    def __post_init__(self) -> None:
        height, width = self.places.size
        if self.image.size != (width, height):
            raise ValueError(f"the image is {self.image.size}, but its tokens were placed on {(width, height)}")
        total = len(self.places.kinds)
        if any(len(tokens) and not 0 <= tokens.min() <= tokens.max() < total for tokens in self.kept):
            raise ValueError(f"a kept token is not among the {total} tokens of its image")

    def panels(self) -> list[str]:
        """The kinds of tokens that have a panel; newlines are drawn beside the grid."""
        counts = self.places.counts(self.kept[0])
        return [kind for kind in ("base", "grid") if counts.get(kind) or (kind == "grid" and counts.get("newline"))]

    @property
    def counts(self) -> list[int]:
        """Number of tokens at each stage."""
        return [len(tokens) for tokens in self.kept]

    def totals(self, stage: int) -> str:
        """For example ``288 of 576 tokens (50%)``."""
        return share_of(self.counts[stage], self.counts[0])


def share_of(kept: int, total: int) -> str:
    """For example ``288 of 576 tokens (50%)``."""
    return f"{kept} of {total} tokens ({100 * kept / total:.3g}%)"


def draw(images: Sequence[ImageStages], stages: Sequence[str], title: str = "") -> Image.Image:
    """Draw all images and stages.

    Args:
        images: drawn from top to bottom, each with a panel for its base tile and one for its grid.
        stages: headings of the columns, one for each entry of every image's ``kept``.
        title: the title, for example the prompt.

    Raises:
        ValueError: there is no image, or the number of stages of an image differs from ``stages``.
    """
    if not images:
        raise ValueError("there are no images to draw; pass at least one")
    for item in images:
        if len(item.kept) != len(stages):
            raise ValueError(f"an image has tokens of {len(item.kept)} stages, but {len(stages)} stages are named")
    width = 2 * MARGIN + len(stages) * (PANEL[0] + STRIP + 4) + (len(stages) - 1) * GAP
    lines = wrapped(title, width - 2 * MARGIN)
    top = MARGIN + len(lines) * 28 + (12 if lines else 0)
    blocks = [_block_height(item) for item in images]
    canvas = Image.new("RGB", (width, top + 44 + sum(blocks) + GAP * (len(blocks) - 1) + MARGIN), PAPER)
    pen = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        pen.text((MARGIN, MARGIN + 28 * number), line, INK, font(20, bold=True))
    for column, heading in enumerate(stages):
        left = MARGIN + column * (PANEL[0] + STRIP + 4 + GAP)
        pen.text((left, top), heading, INK, font(16, bold=True))
        below = top + 30
        for number, (item, height) in enumerate(zip(images, blocks, strict=True), start=1):
            name = f"image {number}: " if len(images) > 1 else ""
            pen.text((left, below), name + item.totals(column), SOFT, font(14))
            _draw_panels(canvas, item, column, left, below + LINE)
            below += height + GAP
    return canvas


def panel(item: ImageStages, stage: int, kind: str, size: tuple[int, int]) -> Image.Image:
    """The image at ``size`` (width, height), faded except for the tokens of ``kind`` that are kept at ``stage``."""
    width, height = size
    tokens = item.kept[stage]
    boxes = item.places.boxes[tokens[item.places.kinds[tokens] == kind]]
    rows, columns = item.places.size
    edges = np.rint(boxes * np.array([width / columns, height / rows] * 2)).astype(np.int64)
    is_kept = np.zeros((height, width), dtype=bool)
    for left, top, right, bottom in edges.tolist():
        is_kept[top:bottom, left:right] = True
    pixels = np.asarray(item.image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    gray = pixels.mean(axis=-1, keepdims=True)
    faded = (1 - FADE) * gray + FADE * np.array(DROPPED)
    return Image.fromarray(np.where(is_kept[..., None], pixels, faded).astype(np.uint8))


def panel_size(item: ImageStages) -> tuple[int, int]:
    """Width and height of an image's panels in pixels."""
    height, width = item.places.size
    scale = min(PANEL[0] / width, PANEL[1] / height)
    return max(8, round(width * scale)), max(8, round(height * scale))


def _block_height(item: ImageStages) -> int:
    return LINE + len(item.panels()) * (panel_size(item)[1] + LINE + 10)


def _draw_panels(canvas: Image.Image, item: ImageStages, stage: int, left: int, y: int) -> None:
    """Draw the panels of one image at one stage, from top to bottom, with token counts."""
    pen = ImageDraw.Draw(canvas)
    total, kept = item.places.counts(item.kept[0]), item.places.counts(item.kept[stage])
    size = panel_size(item)
    for kind in item.panels():
        pen.rectangle((left - 1, y - 1, left + size[0], y + size[1]), outline=RULE)
        canvas.paste(panel(item, stage, kind, size), (left, y))
        pen.text((left, y + size[1] + 5), f"{kind} {kept.get(kind, 0)} of {total.get(kind, 0)}", INK, font(13))
        if kind == "grid" and "newline" in total:
            _draw_newlines(pen, item, stage, (left + size[0] + 4, y))
            words = f"newline {kept['newline']} of {total['newline']}"
            pen.text((left + PANEL[0] + STRIP + 4, y + size[1] + 5), words, NEWLINE_KEPT, font(13), anchor="ra")
        y += size[1] + LINE + 10


def _draw_newlines(pen: ImageDraw.ImageDraw, item: ImageStages, stage: int, corner: tuple[int, int]) -> None:
    """Draw a strip with one mark for the newline token of each row."""
    left, top = corner
    scale = panel_size(item)[1] / item.places.size[0]
    kept = set(item.kept[stage].tolist())
    for token in np.flatnonzero(item.places.kinds == "newline").tolist():
        above, below = np.rint(item.places.boxes[token, 1::2] * scale).astype(int).tolist()
        last = max(above, below - 2)  # leave a pixel between marks if there is room
        fill = NEWLINE_KEPT if token in kept else NEWLINE_DROPPED
        pen.rectangle((left, top + above, left + STRIP - 1, top + last), fill)


def wrapped(text: str, width: int) -> list[str]:
    """Wrap ``text`` to lines of at most ``width`` pixels in the font of the title."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font(20, bold=True).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans from matplotlib's files."""
    import matplotlib  # imported here, because training does not need it

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
