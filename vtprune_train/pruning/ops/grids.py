"""Where an image's tokens lie, and how to spread a number of them over it. Host only, numpy.

A raster is ``(rows, columns)``; an image's tokens are the cells of its rasters, raster after raster, row after row.
Columns of newline features are cells like others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vtprune_train.core.stream import SpanLayout

Raster = tuple[int, int]


def rasters_of(span: SpanLayout) -> tuple[Raster, ...]:
    """The rasters of the tokens that a boundary finds; one row where the family does not say, or where an earlier
    method has taken cells away."""
    fits = sum(rows * columns for rows, columns in span.grids) == span.before
    return span.grids if span.grids and fits else ((1, span.before),)


def spread(count: int, length: int) -> np.ndarray:
    """[count] int64 ascending, different places in ``range(length)``, each in the middle of an equal share of it."""
    return ((2 * np.arange(count) + 1) * length) // (2 * max(count, 1))


def shared(count: int, weights: Sequence[int]) -> list[int]:
    """``count`` things dealt in proportion to ``weights``, none getting more than its weight: the whole parts first,
    then one each by the largest remainder (the first of equal ones).

    Args:
        count: at most ``sum(weights)``.
        weights: not negative.
    """
    total = max(sum(weights), 1)
    dealt = [count * weight // total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: -(count * weights[i] % total))
    for i in by_remainder[: count - sum(dealt)]:
        dealt[i] += 1
    return dealt


def blocks(raster: Raster, count: int) -> np.ndarray:
    """[rows * columns] int64: the raster cut into ``count`` near-square blocks, numbered row after row.

    Bands of rows first, ``sqrt(count * rows / columns)`` of them rounded; the blocks are dealt evenly to the bands, and
    each band's columns evenly to its blocks. Sizes differ by at most one row and one column within a band.

    Args:
        count: 1 to ``rows * columns``.
    """
    rows, columns = raster
    bands = round(math.sqrt(count * rows / columns))
    bands = min(max(bands, -(-count // columns), 1), rows, count)
    first = np.arange(bands + 1) * count // bands  # the first block of each band
    band_of_row = (np.arange(rows) * bands) // rows
    in_band = np.diff(first)[band_of_row]  # [rows]
    column_block = (np.arange(columns)[None, :] * in_band[:, None]) // columns
    return (first[band_of_row][:, None] + column_block).ravel()


def block_centres(raster: Raster, count: int) -> np.ndarray:
    """[count] int64 ascending, the cell in the middle of each of :func:`blocks`."""
    columns = raster[1]
    of_cell = blocks(raster, count)
    order = np.argsort(of_cell, kind="stable")
    centres = []
    for cells in np.split(order, np.cumsum(np.bincount(of_cell, minlength=count))[:-1]):
        row, column = np.unique(cells // columns), np.unique(cells % columns)
        centres.append(row[(len(row) - 1) // 2] * columns + column[(len(column) - 1) // 2])
    return np.array(centres, dtype=np.int64)


def image_blocks(rasters: Sequence[Raster], count: int) -> tuple[np.ndarray, np.ndarray]:
    """``count`` blocks of an image of several rasters, shared by their cells; all cells belong to some block of their
    own raster, or to none (-1) where a raster gets no block.

    Returns:
        [cells] int64, the block of each cell; [count] int64, the cell in the middle of each block.
    """
    own = shared(count, [rows * columns for rows, columns in rasters])
    of_cell, centres, cells, done = [], [], 0, 0
    for raster, blocks_here in zip(rasters, own, strict=True):
        size = raster[0] * raster[1]
        if blocks_here:
            of_cell.append(blocks(raster, blocks_here) + done)
            centres.append(block_centres(raster, blocks_here) + cells)
        else:
            of_cell.append(np.full(size, -1, dtype=np.int64))
        cells, done = cells + size, done + blocks_here
    empty = np.zeros(0, dtype=np.int64)
    return np.concatenate([empty, *of_cell]), np.concatenate([empty, *centres])


def even_cells(rasters: Sequence[Raster], count: int) -> np.ndarray:
    """[count] int64 ascending, cells that spread evenly over an image's rasters."""
    return image_blocks(rasters, count)[1]


def strided_cells(rasters: Sequence[Raster], stride: int) -> np.ndarray:
    """Ascending: every ``stride``-th cell of every ``stride``-th row of each raster; of a raster of one row (where
    nothing more is known) every ``stride ** 2``-th cell, so that about the same share is taken."""
    found, cells = [np.zeros(0, dtype=np.int64)], 0
    for rows, columns in rasters:
        step = stride if rows > 1 else stride**2
        found.append(cells + np.arange(rows * columns).reshape(rows, columns)[::stride, ::step].ravel())
        cells += rows * columns
    return np.concatenate(found)
