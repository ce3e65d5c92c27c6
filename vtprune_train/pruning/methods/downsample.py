"""The baseline ``downsample``: smaller images.

Source: VTC-Bench (arXiv 2510.07143; Chenfei-Liao/VTC-Bench @ 1c413c4, ``qwen2_vl.py``) shrinks both sides of the image
by a whole number, with bicubic interpolation, before the processor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from vtprune_train.core.flops import Grid, TowerGeometry
from vtprune_train.core.rounding import floor_of
from vtprune_train.core.stream import to_device
from vtprune_train.pruning.methods.one_share import MergedInTower
from vtprune_train.pruning.needs import Needs
from vtprune_train.pruning.tower import Merged, TowerChange


class Downsample(MergedInTower):
    """Tiles are downsampled before the vision tower, to at most ``floor(keep * n)`` of their n patches; each image then
    keeps ``floor(keep * n)`` of its tokens, one for each patch of its downsampled tiles.

    Args:
        keep: share of patches, in (0, 1]: 1/4 halves both sides. The downsampled grid is as square as possible.
        positions: ``keep`` gives each kept token the position of the first patch that it replaces; ``renumber`` numbers
            them 0, 1, ...
    """

    name = "downsample"
    paper = "baseline"
    trains = "yes"

    @property
    def needs(self) -> Needs:
        return Needs(positions=self.positions, tower=Smaller(self.name, self.keep))


@dataclass(frozen=True)
class Smaller(TowerChange):
    """The smaller tiles of :class:`Downsample`."""

    fixed = True

    name: str
    keep: float

    def image_grid(self, tower: TowerGeometry) -> Grid:
        rows, columns = tower.grid
        count = max(1, floor_of(self.keep, tower.patches))
        fewer = min(rows, math.isqrt(count))
        return fewer, min(columns, count // fewer)

    def remaining(self, tower: TowerGeometry) -> tuple[int, ...]:
        rows, columns = self.image_grid(tower)
        return (rows * columns,) * tower.depth

    def start(self, hidden: Tensor, tower: TowerGeometry, module: nn.Module | None) -> Merged:
        tokens = super().start(hidden, tower, module)
        index = smaller_patches(tower.grid, self.image_grid(tower)) + tower.class_tokens
        return tokens._replace(groups=to_device(index, hidden.device).expand(len(hidden), -1))


def smaller_patches(grid: Grid, smaller: Grid) -> np.ndarray:
    """[rows * columns] int64, the patch of a grid of the size ``smaller`` that covers the upper left corner of each
    patch of ``grid``; in row-major order."""
    row, column = (np.arange(old) * new // old for old, new in zip(grid, smaller, strict=True))
    return (row[:, None] * smaller[1] + column).ravel()
