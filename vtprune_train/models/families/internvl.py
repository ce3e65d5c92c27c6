"""InternVL in transformers' format: the tiles of an image, followed by a thumbnail if there are several tiles, in one
run of image tokens.

Each visual token merges four patches (pixel shuffle).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vtprune_train.core.flops import TowerGeometry
from vtprune_train.models.families.base import LLAMA_LIKE, Family
from vtprune_train.models.families.layout import ImageGeometry, Size
from vtprune_train.models.families.places import Places, grid_places
from vtprune_train.models.families.towers import patch_grid


@dataclass(frozen=True)
class TilesAndThumbnail(ImageGeometry):
    """``rows`` x ``columns`` tokens per tile of ``tile_size`` pixels, and ``min_tiles`` to ``max_tiles`` tiles without
    the thumbnail.

    Source: ``GotOcr2ImageProcessor`` of transformers.
    """

    tile_size: Size
    rows: int
    columns: int
    min_tiles: int
    max_tiles: int

    @classmethod
    def of(cls, config: Any, image_processor: Any) -> TilesAndThumbnail:
        """The geometry for an ``InternVLConfig`` and the checkpoint's image processor."""
        rows, columns = (int(patches * config.downsample_ratio) for patches in patch_grid(config.vision_config))
        size = image_processor.size
        limits = (image_processor.min_patches, image_processor.max_patches)
        if not image_processor.crop_to_patches:
            limits = (1, 1)
        return cls((size["height"], size["width"]), rows, columns, *limits)

    def grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns of tiles."""
        if self.max_tiles == 1:
            return 1, 1
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas  # needs Pillow

        columns, rows = get_optimal_tiled_canvas(tuple(size), self.tile_size, self.min_tiles, self.max_tiles)
        return rows, columns

    def tiles(self, sizes: Sequence[Size]) -> list[int]:
        counts = [rows * columns for rows, columns in map(self.grid, sizes)]
        return [count + 1 if count > 1 else 1 for count in counts]

    def tokens(self, sizes: Sequence[Size]) -> list[int]:
        return [tiles * self.rows * self.columns for tiles in self.tiles(sizes)]

    def places(self, sizes: Sequence[Size], image_processor: Any) -> list[Places]:
        """Positions tile by tile, in each tile row by row, then those of the thumbnail. The image is resized to fill
        the tiles, ignoring its aspect ratio."""
        return [self._places(size) for size in sizes]

    def _places(self, size: Size) -> Places:
        rows, columns = self.grid(size)
        tiles = grid_places(*size, rows * self.rows, columns * self.columns).boxes
        tiles = tiles.reshape(rows, self.rows, columns, self.columns, 4).transpose(0, 2, 1, 3, 4).reshape(-1, 4)
        thumbnail = grid_places(*size, self.rows, self.columns).boxes[: None if rows * columns > 1 else 0]
        kinds = np.array(["grid"] * len(tiles) + ["base"] * len(thumbnail))
        return Places(size, kinds, np.concatenate([tiles, thumbnail]))

    def examples(self) -> list[Size]:
        height, width = self.tile_size
        return [(height, width), (height, 2 * width), (2 * height, 2 * width), (3 * height, 4 * width)]


def _flops(config: Any) -> TowerGeometry:
    vision = config.vision_config
    rows, columns = patch_grid(vision)
    merge = int(1 / config.downsample_ratio) ** 2
    return TowerGeometry(
        num_layers=vision.num_hidden_layers,
        hidden=vision.hidden_size,
        intermediate=vision.intermediate_size,
        patches=rows * columns,
        patch_size=vision.patch_size[0],
        projector_in=vision.hidden_size * merge,
        projector_out=config.text_config.hidden_size,
        merge=merge,
    )


def _counting(config: Any) -> dict[str, Any]:
    rows, columns = patch_grid(config.vision_config)
    return {"image_seq_length": int(rows * columns * config.downsample_ratio**2)}


FAMILY = Family(
    title="InternVL",
    model_type="internvl",
    model_class="InternVLForConditionalGeneration",
    text_types=LLAMA_LIKE,
    run_is_one_image=True,
    geometry=TilesAndThumbnail.of,
    flops=_flops,
    counting=_counting,
)
