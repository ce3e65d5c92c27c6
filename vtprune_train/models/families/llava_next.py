"""LLaVA-NeXT: AnyRes tiling and ``spatial_unpad``, implemented as index arithmetic on the host.

An image becomes one base tile (the whole image, resized) and a grid of tiles at its best-fitting resolution. After
projection, rows and columns of the grid that contain only padding are removed and a newline feature is appended to
every row. All of this is one gather: :func:`visual_index` gives the row of the projected features for each visual
token. LLaVA-OneVision uses the same tiling.

Source: ``LlavaNextModel.pack_image_features``, ``LlavaNextProcessor`` and ``LlavaNextImageProcessor`` of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaNextConfig, LlavaNextImageProcessorPil
from transformers.image_processing_utils import select_best_resolution

from vtprune_train.models.families.base import LLAMA_LIKE, Family, Loop
from vtprune_train.models.families.known import llava_vicuna_7b
from vtprune_train.models.families.layout import NEWLINE, GatheredTiles, Grids, SampleImages, Size, TokenPatches
from vtprune_train.models.families.places import Places, cells, edges
from vtprune_train.models.families.towers import (
    after_features,
    check_class_token_is_dropped,
    counted_by_patches,
    saved_by_tiles,
    tile_tower,
)


@dataclass(frozen=True)
class AnyRes(GatheredTiles):
    """AnyRes tiling: candidate resolutions ``(height, width)``, and the tower's tile and patch size, in pixels."""

    pinpoints: tuple[tuple[int, int], ...]
    tile_size: int
    patch_size: int

    @classmethod
    def of(cls, config: Any) -> AnyRes:
        """The layout for a ``LlavaNextConfig``.

        Raises:
            ValueError: the config keeps the class token, or its pinpoints are not multiples of the tile size.
        """
        check_class_token_is_dropped(config)
        return cls.of_pinpoints(config)

    @classmethod
    def of_pinpoints(cls, config: Any) -> AnyRes:
        """The layout for any config with pinpoints, tile size and patch size.

        Raises:
            ValueError: the pinpoints are not multiples of the tile size.
        """
        tile = config.vision_config.image_size
        pinpoints = tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)
        wrong = [list(point) for point in pinpoints if point[0] % tile or point[1] % tile]
        if wrong:
            raise ValueError(f"image_grid_pinpoints {wrong} are not multiples of the tower's image_size {tile}")
        return cls(pinpoints, tile, config.vision_config.patch_size)

    def grid(self, image_size: Size) -> tuple[int, int]:
        """Rows and columns of tiles for an image of ``(height, width)`` pixels."""
        height, width = select_best_resolution(tuple(image_size), [list(point) for point in self.pinpoints])
        return height // self.tile_size, width // self.tile_size

    def num_tiles(self, image_size: Size) -> int:
        """Number of tiles, including the base tile."""
        rows, columns = self.grid(image_size)
        return 1 + rows * columns

    def visual_index(self, image_size: Size) -> np.ndarray:
        return _visual_index(self, int(image_size[0]), int(image_size[1]))

    def feature_grid(self, image_size: Size) -> tuple[int, int]:
        """Rows and columns of features in the grid, without padding and newlines."""
        rows, columns = (tiles * self.patches_per_side for tiles in self.grid(image_size))
        top, left = _padding(*image_size, rows, columns)
        return rows - 2 * top, columns - 2 * left

    def grids(self, sizes: Sequence[Size]) -> list[Grids]:
        """The grid of the base tile, and the grid of the unpadded tiles with a column of newlines."""
        side = self.patches_per_side
        return [((side, side), (rows, columns + 1)) for rows, columns in map(self.feature_grid, sizes)]

    def examples(self) -> list[Size]:
        return list(self.pinpoints)

    def model_inputs(self, images: SampleImages) -> dict[str, Tensor]:
        return {
            "pixel_values": pad_sequence(images.pixels, batch_first=True),
            "image_sizes": torch.tensor(images.sizes),
        }

    def places(self, sizes: Sequence[Size], image_processor: Any) -> list[Places]:
        return [self.tiled_places(size, self.feature_grid(size)) for size in sizes]

    def tiled_places(self, size: Size, kept: tuple[int, int]) -> Places:
        """Positions of the base tile, then of the grid row by row, each row followed by a newline.

        The tiles of the grid contain the image resized with its aspect ratio, centered in padding. At the edge of the
        image, a patch may be partly padding; its box covers only the image. ``spatial_unpad`` removes whole features,
        so up to half a feature along the padded edges may not belong to any token.

        Args:
            size: ``(height, width)`` of the image in pixels.
            kept: rows and columns of the unpadded features, after pooling if there is any.
        """
        height, width = size
        rows, columns = self.grid(size)
        scale = min(rows * self.tile_size / height, columns * self.tile_size / width)
        used = self.feature_grid(size)
        tops = self._grid_edges(rows, height, scale, used[0], kept[0])
        lefts = self._grid_edges(columns, width, scale, used[1], kept[1])
        right = np.full(kept[0], float(width))
        newlines = np.stack([right, tops[:-1], right, tops[1:]], axis=-1)
        grid = np.concatenate([cells(tops, lefts), newlines[:, None]], axis=1).reshape(-1, 4)
        steps = self.tile_edges(1) / self.tile_size
        base = cells(steps * height, steps * width).reshape(-1, 4)
        row = ["grid"] * kept[1] + ["newline"]
        kinds = np.array(["base"] * len(base) + row * kept[0])
        return Places((height, width), kinds, np.concatenate([base, grid]))

    def _grid_edges(self, tiles: int, original: int, scale: float, used: int, kept: int) -> np.ndarray:
        """[kept + 1] edges of the unpadded features along one axis, in pixels of the original."""
        target = tiles * self.tile_size
        resized = min(math.ceil(original * scale), target)
        every = edges(self.tile_edges(tiles), original, resized, (target - resized) // 2)
        cut = (tiles * self.patches_per_side - used) // 2
        unpadded = every[cut : cut + used + 1]
        return unpadded if kept == used else np.interp(np.linspace(0, used, kept + 1), np.arange(used + 1), unpadded)


@lru_cache(maxsize=65536)
def _visual_index(anyres: AnyRes, height: int, width: int) -> np.ndarray:
    side, per_tile = anyres.patches_per_side, anyres.patches_per_tile
    rows, columns = anyres.grid((height, width))
    tiles = np.arange(per_tile, per_tile * (1 + rows * columns)).reshape(rows, columns, side, side)
    features = tiles.transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
    top, left = _padding(height, width, *features.shape)
    features = features[top : features.shape[0] - top, left : features.shape[1] - left]
    newlines = np.full((features.shape[0], 1), NEWLINE)
    index = np.concatenate([np.arange(per_tile), np.concatenate([features, newlines], axis=1).ravel()])
    index.setflags(write=False)
    return index


def _padding(height: int, width: int, grid_height: int, grid_width: int) -> tuple[int, int]:
    """Number of feature rows above (and below) and columns left (and right) of the image that contain only padding."""
    if width / height > grid_width / grid_height:
        used = int(round(height * (grid_width / width), 7))
        return (grid_height - used) // 2, 0
    used = int(round(width * (grid_height / height), 7))
    return 0, (grid_width - used) // 2


def image_processor(config: Any) -> LlavaNextImageProcessorPil:
    tile = config.vision_config.image_size
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        image_grid_pinpoints=[list(point) for point in config.image_grid_pinpoints],
    )


def patches_of_images(config: Any, inputs: Mapping[str, Any]) -> list[TokenPatches]:
    layout = AnyRes.of_pinpoints(config)
    sizes = inputs["image_sizes"].tolist()
    return [(layout.visual_index(size), layout.num_tiles(size)) for size in sizes]


PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # pinpoints of the published checkpoints

FAMILY = Family(
    title="LLaVA-NeXT",
    model_type="llava_next",
    model_class="LlavaNextForConditionalGeneration",
    text_types=LLAMA_LIKE,
    grids=lambda config, inputs: AnyRes.of(config).grids(inputs["image_sizes"].tolist()),
    patches=patches_of_images,
    counting=counted_by_patches,
    flops=tile_tower,
    not_original=None,
    known={
        "llava-hf/llava-v1.6-vicuna-7b-hf": lambda: llava_vicuna_7b(LlavaNextConfig, image_grid_pinpoints=PINPOINTS)
    },
    loop=Loop(
        layout=lambda config, _: AnyRes.of(config),
        image_processor=image_processor,
        image_processors=("LlavaNextImageProcessor",),
        saved=saved_by_tiles,
        untrained=after_features,
    ),
)
