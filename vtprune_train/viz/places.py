"""Where in the original picture each visual token of an image lies. Geometry only: no tensors, no model.

Shape suffixes: V visual tokens of one image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vtprune_train.models.families.anyres import NEWLINE, AnyRes

KINDS = ("base", "grid", "newline")


@dataclass(frozen=True)
class Places:
    """One image's V visual tokens, in their order.

    Args:
        size: ``(height, width)`` of the original picture in pixels.
        kinds: [V] str: ``base`` (sees the whole picture squeezed into one tile), ``grid`` (sees it at its resolution)
            or ``newline`` (ends a row of the grid).
        boxes: [V, 4] float64, left, top, right, bottom in pixels of the original picture. A newline token sees nothing:
            its box is a line on the right edge, as tall as its row.
    """

    size: tuple[int, int]
    kinds: np.ndarray
    boxes: np.ndarray

    def counts(self, tokens: np.ndarray) -> dict[str, int]:
        """How many of ``tokens`` [K] int64 are of each kind that the image has."""
        return {kind: int((self.kinds[tokens] == kind).sum()) for kind in KINDS if (self.kinds == kind).any()}


def grid_places(height: int, width: int, rows: int, columns: int) -> Places:
    """Of a family that sees an image as one grid of tokens over the whole picture.

    Args:
        height: of the picture, in pixels, as is ``width``.
        width: see ``height``.
        rows: of the grid, in tokens, as are ``columns``.
        columns: see ``rows``.

    Raises:
        ValueError: one of them is not positive.
    """
    if min(height, width, rows, columns) < 1:
        raise ValueError(f"{rows} x {columns} tokens over {height} x {width} pixels: all four must be at least 1")
    boxes = _cells(np.arange(rows + 1) * (height / rows), np.arange(columns + 1) * (width / columns))
    return Places((height, width), np.full(rows * columns, "grid"), boxes.reshape(-1, 4))


def anyres_places(anyres: AnyRes, image_size: Sequence[int]) -> Places:
    """Of LLaVA-NeXT: the base tile, then the grid row by row, each row ended by a newline.

    The grid's tiles hold the picture resized with its aspect kept, centred between padding. An edge feature may see
    the picture with a part of its patch only: its box is as small. And ``spatial_unpad`` counts whole features: a strip
    of up to half a feature along the padded edges can belong to no grid token.

    Source: ``LlavaNextImageProcessor`` and ``unpad_image`` of transformers.

    Args:
        anyres: the tiling geometry.
        image_size: ``(height, width)`` of the picture in pixels.
    """
    height, width = int(image_size[0]), int(image_size[1])
    side, tile = anyres.patches_per_side, anyres.tile_size
    steps = np.arange(side + 1) / side
    base = _cells(steps * height, steps * width).reshape(-1, 4)
    rows, columns = anyres.grid((height, width))
    scale = min(rows * tile / height, columns * tile / width)
    tops = _edges(rows * tile, rows * side, height, scale)
    lefts = _edges(columns * tile, columns * side, width, scale)
    grid = _cells(tops, lefts).reshape(rows, side, columns, side, 4).transpose(0, 2, 1, 3, 4).reshape(-1, 4)

    index = anyres.visual_index((height, width))
    is_newline = index == NEWLINE
    boxes = np.concatenate([base, grid])[index]
    cut = (rows * side - is_newline.sum()) // 2  # rows of features above the picture, and as many below
    kept = slice(cut, rows * side - cut)
    right = np.full(is_newline.sum(), float(width))
    boxes[is_newline] = np.stack([right, tops[:-1][kept], right, tops[1:][kept]], axis=-1)
    kinds = np.where(np.arange(len(index)) < anyres.patches_per_tile, "base", "grid")
    return Places((height, width), np.where(is_newline, "newline", kinds), boxes)


def _edges(target: int, features: int, original: int, scale: float) -> np.ndarray:
    """[features + 1]: where ``target`` pixels, holding the resized picture in their middle, are cut into features; in
    pixels of the original and not beyond it."""
    resized = min(math.ceil(original * scale), target)
    before = (target - resized) // 2
    return np.clip((np.arange(features + 1) * (target / features) - before) * (original / resized), 0, original)


def _cells(tops: np.ndarray, lefts: np.ndarray) -> np.ndarray:
    """[rows, columns, 4] boxes between [rows + 1] and [columns + 1] edges."""
    top, left = np.meshgrid(tops[:-1], lefts[:-1], indexing="ij")
    bottom, right = np.meshgrid(tops[1:], lefts[1:], indexing="ij")
    return np.stack([left, top, right, bottom], axis=-1)
