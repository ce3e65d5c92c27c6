"""LLaVA-1.5: an image is one tile with one visual token per patch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPImageProcessorPil, LlavaConfig

from vtprune_train.models.families.base import LLAMA_LIKE, Family, Loop
from vtprune_train.models.families.known import llava_vicuna_7b
from vtprune_train.models.families.layout import GatheredTiles, Grids, SampleImages, Size, TokenPatches, check_aspect
from vtprune_train.models.families.places import Places, square_edges
from vtprune_train.models.families.towers import (
    CLASS_TOKENS,
    after_features,
    check_class_token_is_dropped,
    counted_by_patches,
    patch_grid,
    saved_by_tiles,
    tile_tower,
)


@dataclass(frozen=True)
class OneTile(GatheredTiles):
    """Layout with one tile per image; ``tile_size`` and ``patch_size`` of the tower are in pixels."""

    tile_size: int
    patch_size: int

    @classmethod
    def of(cls, config: Any) -> OneTile:
        """The layout for a ``LlavaConfig``.

        Raises:
            ValueError: the tower is not CLIP's, or the config keeps its class token.
        """
        vision = config.vision_config
        if vision.model_type != "clip_vision_model":
            raise ValueError(
                f"the vision tower is a {vision.model_type}; the training loop supports LlavaForConditionalGeneration "
                "with CLIP (clip_vision_model) only"
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

    def model_inputs(self, images: SampleImages) -> dict[str, Tensor]:
        return {"pixel_values": torch.cat(images.pixels)}

    def places(self, sizes: Sequence[Size], image_processor: Any) -> list[Places]:
        """Positions for an image that may be padded to a square and is then resized and center-cropped."""
        places = []
        for size in sizes:
            canvas = (max(size), max(size)) if getattr(image_processor, "do_pad", None) else size
            resized = _resized(canvas, image_processor)
            tops, lefts = (
                square_edges(self.tile_edges(1), length, whole, target, -((target - self.tile_size) // 2))
                for length, whole, target in zip(size, canvas, resized, strict=True)
            )
            places.append(Places.of_grid(size, tops, lefts))
        return places


def _resized(size: Size, image_processor: Any) -> Size:
    """The size of the resized image, as in transformers' ``get_resize_output_image_size``."""
    target = image_processor.size
    if not image_processor.do_resize:
        return size
    if (short := target.get("shortest_edge")) is None:
        return target["height"], target["width"]
    height, width = (short if side == min(size) else int(short * side / min(size)) for side in size)
    return height, width


@lru_cache
def _all_patches(count: int) -> np.ndarray:
    index = np.arange(count)
    index.setflags(write=False)
    return index


def _image_processor(config: Any) -> CLIPImageProcessorPil:
    tile = config.vision_config.image_size
    return CLIPImageProcessorPil(size={"shortest_edge": tile}, crop_size={"height": tile, "width": tile})


def _patches(config: Any, inputs: Mapping[str, Any]) -> list[TokenPatches]:
    """One tile per image. Depending on the config its first token, a class token, is kept (as -1) or dropped."""
    class_tokens = CLASS_TOKENS[config.vision_config.model_type]
    first = 1 if config.vision_feature_select_strategy == "default" else 0
    tokens = np.arange(first, int(np.prod(patch_grid(config.vision_config))) + class_tokens)
    return [(tokens - class_tokens, 1)] * len(inputs["pixel_values"])


FAMILY = Family(
    title="LLaVA-1.5",
    model_type="llava",
    model_class="LlavaForConditionalGeneration",
    text_types=LLAMA_LIKE,
    grids=lambda config, inputs: [(patch_grid(config.vision_config),)] * len(inputs["pixel_values"]),
    patches=_patches,
    counting=counted_by_patches,
    flops=tile_tower,
    not_original=None,
    known={"llava-hf/llava-1.5-7b-hf": lambda: llava_vicuna_7b(LlavaConfig)},
    loop=Loop(
        layout=lambda config, _: OneTile.of(config),
        image_processor=_image_processor,
        image_processors=None,
        projector=("model.multi_modal_projector.",),
        saved=saved_by_tiles,
        untrained=after_features,
    ),
)
