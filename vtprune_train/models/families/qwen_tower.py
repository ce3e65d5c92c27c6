"""What a vision tower for images of any size computes from their grids, computed on the host from numbers alone.

Such a tower runs over the patches of all images in one row and splits attention by ``cu_seqlens``: one segment a frame,
and in the windowed layers of Qwen2.5-VL one a window. Left to itself it reads the grids from the device several times;
it takes these tensors as keywords instead.

Shape suffixes: N patches of all images, M merged patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

PatchGrids = tuple[tuple[int, int, int], ...]
"""``(frames, rows, columns)`` of each image's patches."""


@dataclass(frozen=True)
class PositionTable:
    """A learned square table of positions, ``side`` x ``side``, resampled to each image's grid (Qwen3-VL)."""

    side: int
    mode: str
    align_corners: bool


@dataclass(frozen=True)
class TowerShape:
    """``merge_size`` x ``merge_size`` patches of ``patch_size`` pixels are merged; ``window_size`` pixels a side of an
    attention window, ``None`` without windowed layers; ``table``: learned positions, ``None`` without."""

    merge_size: int
    patch_size: int
    window_size: int | None = None
    table: PositionTable | None = None

    @classmethod
    def of(cls, tower: Any) -> TowerShape:
        """Read a vision tower of Qwen2-VL, Qwen2.5-VL or Qwen3-VL."""
        table = None
        if hasattr(tower, "num_grid_per_side"):
            table = PositionTable(tower.num_grid_per_side, tower.interpolation_mode, tower.interpolation_align_corners)
        window = getattr(tower, "window_size", None)
        return cls(tower.spatial_merge_size, tower.config.patch_size, window, table)

    @property
    def keywords(self) -> set[str]:
        """The keywords that :func:`tower_inputs` returns."""
        names = {"position_ids", "cu_seqlens", "max_seqlen"}
        if self.window_size is not None:
            names |= {"window_index", "cu_window_seqlens", "max_window_seqlen"}
        if self.table is not None:
            names |= {"interp_indices", "interp_weights"}
        return names


def tower_inputs(shape: TowerShape, grids: PatchGrids) -> dict[str, Tensor | int]:
    """Keywords of the tower's forward, by transformers' own functions, on the CPU.

    Returns:
        ``position_ids`` [N, 2] int64, ``cu_seqlens`` [frames + 1] int32, ``max_seqlen``; with windows ``window_index``
        [M] int64, ``cu_window_seqlens`` [windows + 1] int32, ``max_window_seqlen``; with a table ``interp_indices``
        [N, taps] int64, ``interp_weights`` [N, taps] float32.
    """
    grid_thw = torch.tensor(grids)
    cu_seqlens = get_vision_cu_seqlens(grid_thw)
    inputs: dict[str, Tensor | int] = {
        "position_ids": get_vision_position_ids(grid_thw, shape.merge_size),
        "cu_seqlens": cu_seqlens,
        "max_seqlen": int(cu_seqlens.diff().max()),
    }
    if shape.window_size is not None:
        window_index, cu_windows = get_vision_window_index(
            grid_thw, shape.merge_size, shape.window_size, shape.patch_size
        )
        inputs |= {
            "window_index": window_index,
            "cu_window_seqlens": cu_windows,
            "max_window_seqlen": int(cu_windows.diff().max()),
        }
    if shape.table is not None:
        inputs["interp_indices"], inputs["interp_weights"] = get_vision_interpolation_indices_and_weights(
            grid_thw,
            num_grid_per_side=shape.table.side,
            mode=shape.table.mode,
            align_corners=shape.table.align_corners,
            spatial_merge_size=shape.merge_size,
        )
    return inputs


def frame_lengths(grids: PatchGrids) -> tuple[int, ...]:
    """Patches of each frame of each image: the segments of a layer without windows."""
    return tuple(rows * columns for frames, rows, columns in grids for _ in range(frames))


def window_lengths(shape: TowerShape, grids: PatchGrids) -> tuple[int, ...]:
    """Patches of each window, in the order of ``window_index``; those at an image's edges are smaller."""
    assert shape.window_size is not None
    side = shape.window_size // shape.patch_size // shape.merge_size * shape.merge_size
    lengths: list[int] = []
    for frames, rows, columns in grids:
        own = np.outer(_pieces(rows, side), _pieces(columns, side)).ravel().tolist()
        lengths += own * frames
    return tuple(lengths)


def _pieces(length: int, size: int) -> list[int]:
    """``length`` cut into pieces of ``size``, the last one smaller."""
    return [min(size, length - start) for start in range(0, length, size)]
