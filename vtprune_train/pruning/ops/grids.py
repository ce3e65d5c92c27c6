"""Token grid layout of an image, and how to pick evenly spaced tokens from it. Host only, numpy.

A grid is ``(rows, columns)``; an image's tokens are the cells of its grids, in row-major order, grid by grid.
Newline columns count as ordinary cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vtprune_train.core.stream import SpanLayout

Grid = tuple[int, int]


def grids_of(span: SpanLayout) -> tuple[Grid, ...]:
    """The grids of the candidates at a drop point; a single row if the model family provides no grid or an earlier
    method has already dropped tokens."""
    fits = sum(rows * columns for rows, columns in span.grids) == span.before
    return span.grids if span.grids and fits else ((1, span.before),)


def spread(count: int, length: int) -> np.ndarray:
    """[count] int64 ascending, distinct, evenly spaced indices in ``range(length)``, each at the centre of an equal
    interval."""
    return ((2 * np.arange(count) + 1) * length) // (2 * max(count, 1))


def shared(count: int, weights: Sequence[int]) -> list[int]:
    """Distribute ``count`` items in proportion to ``weights`` with the largest-remainder method, none receiving more
    than its weight; ties go to the first.

    Args:
        count: at most ``sum(weights)``.
        weights: non-negative.
    """
    total = max(sum(weights), 1)
    dealt = [count * weight // total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: -(count * weights[i] % total))
    for i in by_remainder[: count - sum(dealt)]:
        dealt[i] += 1
    return dealt


def blocks(grid: Grid, count: int) -> np.ndarray:
    """[rows * columns] int64 block index of each cell when the grid is divided into ``count`` near-square blocks,
    numbered in row-major order.

    The grid is split into ``round(sqrt(count * rows / columns))`` bands of rows; blocks are distributed evenly over the
    bands, and the columns of a band evenly over its blocks. Sizes differ by at most one row and one column within a
    band.

    Args:
        count: 1 to ``rows * columns``.
    """
    rows, columns = grid
    bands = round(math.sqrt(count * rows / columns))
    bands = min(max(bands, -(-count // columns), 1), rows, count)
    first = np.arange(bands + 1) * count // bands  # the first block of each band
    band_of_row = (np.arange(rows) * bands) // rows
    in_band = np.diff(first)[band_of_row]  # [rows]
    column_block = (np.arange(columns)[None, :] * in_band[:, None]) // columns
    return (first[band_of_row][:, None] + column_block).ravel()


def block_centres(grid: Grid, count: int) -> np.ndarray:
    """[count] int64 ascending, centre cell of each block from :func:`blocks`."""
    columns = grid[1]
    of_cell = blocks(grid, count)
    order = np.argsort(of_cell, kind="stable")
    centres = []
    for cells in np.split(order, np.cumsum(np.bincount(of_cell, minlength=count))[:-1]):
        row, column = np.unique(cells // columns), np.unique(cells % columns)
        centres.append(row[(len(row) - 1) // 2] * columns + column[(len(column) - 1) // 2])
    return np.array(centres, dtype=np.int64)


def image_blocks(grids: Sequence[Grid], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide an image with several grids into ``count`` blocks, distributed over the grids by cell count; cells of a
    grid that gets no block have index -1.

    Returns:
        [cells] int64, the block of each cell; [count] int64, centre cell of each block.
    """
    counts = shared(count, [rows * columns for rows, columns in grids])
    of_cell, centres, cells, done = [], [], 0, 0
    for grid, blocks_here in zip(grids, counts, strict=True):
        size = grid[0] * grid[1]
        if blocks_here:
            of_cell.append(blocks(grid, blocks_here) + done)
            centres.append(block_centres(grid, blocks_here) + cells)
        else:
            of_cell.append(np.full(size, -1, dtype=np.int64))
        cells, done = cells + size, done + blocks_here
    empty = np.zeros(0, dtype=np.int64)
    return np.concatenate([empty, *of_cell]), np.concatenate([empty, *centres])


def even_cells(grids: Sequence[Grid], count: int) -> np.ndarray:
    """[count] int64 ascending, cells evenly spaced over an image's grids."""
    return image_blocks(grids, count)[1]


def strided_cells(grids: Sequence[Grid], stride: int) -> np.ndarray:
    """Ascending indices of every ``stride``-th cell of every ``stride``-th row of each grid. For single-row grids
    (layout unknown), every ``stride ** 2``-th cell, which keeps about the same share."""
    picked, cells = [np.zeros(0, dtype=np.int64)], 0
    for rows, columns in grids:
        step = stride if rows > 1 else stride**2
        picked.append(cells + np.arange(rows * columns).reshape(rows, columns)[::stride, ::step].ravel())
        cells += rows * columns
    return np.concatenate(picked)


def regions(grids: Sequence[Grid], kernel: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide each grid into regions of ``kernel`` x ``kernel`` cells, in row-major order; the last ones of a row or
    column may be smaller. Single-row grids (layout unknown) are divided into runs of ``kernel ** 2`` cells.

    Returns:
        [regions, kernel ** 2] int64, the cells of each region row by row, -1 where the grid ends inside it; [regions]
        int64, its centre cell.
    """
    cells, centres, done = [np.zeros((0, kernel**2), dtype=np.int64)], [np.zeros(0, dtype=np.int64)], 0
    for rows, columns in grids:
        height, width = (kernel, kernel) if rows > 1 else (1, kernel**2)
        down, across = -(-rows // height), -(-columns // width)
        padded = np.full((down * height, across * width), -1, dtype=np.int64)
        padded[:rows, :columns] = done + np.arange(rows * columns).reshape(rows, columns)
        cells.append(padded.reshape(down, height, across, width).transpose(0, 2, 1, 3).reshape(-1, kernel**2))
        middle_rows, middle_columns = _middles(rows, height), _middles(columns, width)
        centres.append((done + middle_rows[:, None] * columns + middle_columns).ravel())
        done += rows * columns
    return np.concatenate(cells), np.concatenate(centres)


def _middles(length: int, size: int) -> np.ndarray:
    """The middle of each interval of ``size``, of which the last may be shorter."""
    starts = np.arange(0, length, size)
    return (starts + np.minimum(starts + size, length) - 1) // 2
