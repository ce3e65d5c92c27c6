"""LLaVA-1.5: a picture is one tile, one token a patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from vtprune_train.models.families.layout import GatheredTiles, Grids, Size, check_aspect, check_class_token_is_dropped


@dataclass(frozen=True)
class OneTile(GatheredTiles):
    """The tower's tile and patch size, in pixels."""

    tile_size: int
    patch_size: int

    @classmethod
    def of(cls, config: Any) -> OneTile:
        """Read a ``LlavaConfig``.

        Raises:
            ValueError: the tower is no CLIP, or the config keeps its class token.
        """
        vision = config.vision_config
        if vision.model_type != "clip_vision_model":
            raise ValueError(
                f"the vision tower is a {vision.model_type}; of LlavaForConditionalGeneration's towers the loop trains "
                "CLIP (clip_vision_model) only"
            )
        check_class_token_is_dropped(config)
        return cls(vision.image_size, vision.patch_size)

    def num_tiles(self, image_size: Size) -> int:
        return 1

    def visual_index(self, image_size: Size) -> np.ndarray:
        check_aspect(image_size)
        return _all_patches(self.patches_per_tile)

    def grids(self, sizes: Sequence[Size]) -> list[Grids]:
        return [((self.patches_per_side, self.patches_per_side),) for _ in sizes]

    def examples(self) -> list[Size]:
        return [(self.tile_size, self.tile_size)]


@lru_cache
def _all_patches(count: int) -> np.ndarray:
    index = np.arange(count)
    index.setflags(write=False)
    return index
