"""Where in the original image each visual token lies. Arithmetic on sizes only.

Shape suffixes: V visual tokens of one image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KINDS = ("base", "grid", "newline")


@dataclass(frozen=True)
class Places:
    """One image's V visual tokens, in their order.

    Args:
        size: ``(height, width)`` of the original image in pixels.
        kinds: [V] str: ``base`` (sees the whole image squeezed into one tile), ``grid`` (sees it at its resolution)
            or ``newline`` (ends a row of the grid).
        boxes: [V, 4] float64, left, top, right, bottom in pixels of the original image. A newline token sees nothing:
            its box is a line on the right edge, as tall as its row. A token that sees only padding has no area.
    """

    size: tuple[int, int]
    kinds: np.ndarray
    boxes: np.ndarray

    def counts(self, tokens: np.ndarray) -> dict[str, int]:
        """How many of ``tokens`` [K] int64 are of each kind that the image has."""
        return {kind: int((self.kinds[tokens] == kind).sum()) for kind in KINDS if (self.kinds == kind).any()}

    @classmethod
    def of_grid(cls, size: tuple[int, int], tops: np.ndarray, lefts: np.ndarray) -> Places:
        """One grid of tokens without newlines, between [rows + 1] and [columns + 1] edges."""
        boxes = cells(tops, lefts).reshape(-1, 4)
        return cls(size, np.full(len(boxes), "grid"), boxes)


def grid_places(height: int, width: int, rows: int, columns: int) -> Places:
    """For a family that sees an image of ``height`` x ``width`` pixels as one grid of tokens over all of it.

    Raises:
        ValueError: a number is not positive.
    """
    if min(height, width, rows, columns) < 1:
        raise ValueError(f"{rows} x {columns} tokens over {height} x {width} pixels: all four must be at least 1")
    tops, lefts = np.arange(rows + 1) * (height / rows), np.arange(columns + 1) * (width / columns)
    return Places.of_grid((height, width), tops, lefts)


def edges(prepared: np.ndarray, original: int, resized: int, before: int = 0) -> np.ndarray:
    """Edges in pixels of the prepared image, in pixels of the original and not beyond it.

    Args:
        prepared: [features + 1], in what the tower sees.
        original: length of the image along this axis.
        resized: what it was resized to.
        before: padding in front of it afterwards; negative for pixels that were cut off.
    """
    return np.clip((prepared - before) * (original / resized), 0, original)


def square_edges(prepared: np.ndarray, original: int, longest: int, resized: int, before: int = 0) -> np.ndarray:
    """:func:`edges` of an image that was padded to a square of its ``longest`` side before it was resized."""
    return np.clip(edges(prepared, longest, resized, before) - (longest - original) // 2, 0, original)


def cells(tops: np.ndarray, lefts: np.ndarray) -> np.ndarray:
    """[rows, columns, 4] boxes between [rows + 1] and [columns + 1] edges."""
    top, left = np.meshgrid(tops[:-1], lefts[:-1], indexing="ij")
    bottom, right = np.meshgrid(tops[1:], lefts[1:], indexing="ij")
    return np.stack([left, top, right, bottom], axis=-1)
