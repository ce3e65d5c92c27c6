"""Positions of visual tokens in the original image, computed from sizes.

Shape suffixes: V visual tokens of one image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KINDS = ("base", "grid", "newline")


@dataclass(frozen=True)
class Places:
    """Positions of the V visual tokens of one image, in order.

    Args:
        size: ``(height, width)`` of the original image in pixels.
        kinds: [V] str: ``base`` (from the whole image resized to one tile), ``grid`` (from the image at its resolution)
            or ``newline`` (ends a row of the grid).
        boxes: [V, 4] float64, left, top, right, bottom in pixels of the original image. The box of a newline token is a
            line on the right edge of its row. The box of a token that covers only padding has no area.
    """

    size: tuple[int, int]
    kinds: np.ndarray
    boxes: np.ndarray

    def counts(self, tokens: np.ndarray) -> dict[str, int]:
        """Count the ``tokens`` [K] int64 by kind, for the kinds that occur in the image."""
        return {kind: int((self.kinds[tokens] == kind).sum()) for kind in KINDS if (self.kinds == kind).any()}

    @classmethod
    def of_grid(cls, size: tuple[int, int], tops: np.ndarray, lefts: np.ndarray) -> Places:
        """A single grid of tokens without newlines, with [rows + 1] and [columns + 1] edges."""
        boxes = cells(tops, lefts).reshape(-1, 4)
        return cls(size, np.full(len(boxes), "grid"), boxes)


def grid_places(height: int, width: int, rows: int, columns: int) -> Places:
    """Positions for an image of ``height`` x ``width`` pixels that one grid of tokens covers.

    Raises:
        ValueError: an argument is not positive.
    """
    if min(height, width, rows, columns) < 1:
        raise ValueError(f"{rows} x {columns} tokens over {height} x {width} pixels: all four must be at least 1")
    tops, lefts = np.arange(rows + 1) * (height / rows), np.arange(columns + 1) * (width / columns)
    return Places.of_grid((height, width), tops, lefts)


def edges(prepared: np.ndarray, original: int, resized: int, before: int = 0) -> np.ndarray:
    """Convert edges from pixels of the prepared image to pixels of the original image, clipped to it.

    Args:
        prepared: [features + 1] edges in the tower's input.
        original: length of the original image along this axis.
        resized: length of the resized image.
        before: padding added before the resized image; negative for pixels that were cropped.
    """
    return np.clip((prepared - before) * (original / resized), 0, original)


def square_edges(prepared: np.ndarray, original: int, longest: int, resized: int, before: int = 0) -> np.ndarray:
    """Like :func:`edges`, for an image that was padded to a square of its ``longest`` side before resizing."""
    return np.clip(edges(prepared, longest, resized, before) - (longest - original) // 2, 0, original)


def cells(tops: np.ndarray, lefts: np.ndarray) -> np.ndarray:
    """[rows, columns, 4] boxes of a grid with [rows + 1] and [columns + 1] edges."""
    top, left = np.meshgrid(tops[:-1], lefts[:-1], indexing="ij")
    bottom, right = np.meshgrid(tops[1:], lefts[1:], indexing="ij")
    return np.stack([left, top, right, bottom], axis=-1)
