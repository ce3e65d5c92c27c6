"""LLaVA-OneVision: AnyRes tiles for a picture that is alone in its sample, shrunk bilinearly where there are too many;
one tile a picture where there are several. A newline feature ends every row, or the single tile.

The features come from the family's own ``get_image_features``; counted here as ``LlavaOnevisionProcessor`` counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vtprune_train.models.families.anyres import AnyRes
from vtprune_train.models.families.layout import NEWLINE, Grids, ImageLayout, Pictures, Shown, Size, VisionInputs

ASPECT = "anyres_max_"
SHRINK_FROM = 1.1  # as published: a grid this much too large (per side) is shrunk


@dataclass(frozen=True)
class OneVision(ImageLayout):
    """``anyres`` tiles; a grid keeps about ``max_tiles`` tiles' worth of features."""

    anyres: AnyRes
    max_tiles: int

    @classmethod
    def of(cls, config: Any) -> OneVision:
        """Read a ``LlavaOnevisionConfig``.

        Raises:
            ValueError: a setting under which the features are no whole grid of patches.
        """
        if config.vision_feature_select_strategy != "full":
            raise ValueError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} is not supported; "
                "LLaVA-OneVision uses 'full' (SigLIP has no class token)"
            )
        number = config.vision_aspect_ratio.removeprefix(ASPECT)
        if not number.isdigit():
            raise ValueError(f"vision_aspect_ratio={config.vision_aspect_ratio!r} is not supported; use {ASPECT}N")
        return cls(AnyRes.of_pinpoints(config), int(number))

    def tokens(self, sizes: Sequence[Size]) -> list[int]:
        if len(sizes) != 1:
            return [self.anyres.patches_per_tile + 1 for _ in sizes]
        rows, columns = self._grid(sizes[0])
        return [self.anyres.patches_per_tile + rows * (columns + 1)]

    def grids(self, sizes: Sequence[Size]) -> list[Grids]:
        tile = (self.anyres.patches_per_side, self.anyres.patches_per_side)
        if len(sizes) != 1:
            return [(tile, (1, 1)) for _ in sizes]  # the newline behind the tile
        rows, columns = self._grid(sizes[0])
        return [(tile, (rows, columns + 1))]

    def patches(self, sizes: Sequence[Size]) -> list[Shown]:
        """For the pictures of one sample, which patch each token shows; of a shrunk grid, the one at its middle."""
        base = np.arange(self.anyres.patches_per_tile)
        if len(sizes) != 1:
            return [(np.append(base, NEWLINE), 1) for _ in sizes]
        whole = self.anyres.feature_grid(sizes[0])
        full = self.anyres.visual_index(sizes[0])[len(base) :].reshape(whole[0], whole[1] + 1)[:, :-1]
        rows, columns = (
            (2 * np.arange(left) + 1) * there // (2 * left)
            for left, there in zip(self._grid(sizes[0]), whole, strict=True)
        )
        shown = np.pad(full[np.ix_(rows, columns)], ((0, 0), (0, 1)), constant_values=NEWLINE)
        return [(np.concatenate([base, shown.ravel()]), self.anyres.num_tiles(sizes[0]))]

    def _grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns of features that remain of the tiles' grid, newlines not counted."""
        rows, columns = self.anyres.feature_grid(size)
        ratio = math.sqrt(rows * columns / (self.max_tiles * self.anyres.patches_per_tile))
        return (int(rows // ratio), int(columns // ratio)) if ratio > SHRINK_FROM else (rows, columns)

    def tiles(self, sizes: Sequence[Size]) -> list[int]:
        return [self.anyres.num_tiles(size) if len(sizes) == 1 else 1 for size in sizes]

    def pixels(self, image_processor: Any, images: Sequence[Image.Image]) -> list[Tensor]:
        if not images:
            return []
        return list(image_processor(images=[list(images)], return_tensors="pt")["pixel_values"])

    def vision_inputs(self, samples: Sequence[Pictures]) -> VisionInputs:
        seen = [sample for sample in samples if sample.sizes] or [self._blank()]
        sizes = [size for sample in seen for size in sample.sizes]
        tokens = sum(sum(self.tokens(sample.sizes)) for sample in samples)
        return VisionInputs(
            pixel_values=torch.cat([pixels for sample in seen for pixels in sample.pixels]),
            visual_index=torch.arange(tokens),
            image_inputs={
                "image_sizes": tuple(sizes),
                "batch_num_images": tuple(len(sample.sizes) for sample in seen),
            },
        )

    def _blank(self) -> Pictures:
        tile = self.anyres.tile_size
        return Pictures([(tile, tile)], [torch.zeros(self.anyres.num_tiles((tile, tile)), 3, tile, tile)])

    def examples(self) -> list[Size]:
        """The square resolutions: from two tiles to more than are kept."""
        return [(height, width) for height, width in self.anyres.pinpoints if height == width] or [
            *self.anyres.pinpoints
        ]
