"""LLaVA-1.5: one picture of a fixed size, one token a patch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import CLIPImageProcessorPil

from vtprune_train.core.flops import TowerGeometry
from vtprune_train.models.families.base import LLAMA_LIKE, Family, Loop, counted_by_patches
from vtprune_train.models.families.layout import CLASS_TOKENS, Grids, Shown
from vtprune_train.models.families.one_tile import OneTile


def _image_processor(config: Any) -> CLIPImageProcessorPil:
    tile = config.vision_config.image_size
    return CLIPImageProcessorPil(size={"shortest_edge": tile}, crop_size={"height": tile, "width": tile})


def _grids(config: Any, inputs: Mapping[str, Any]) -> list[Grids]:
    side = config.vision_config.image_size // config.vision_config.patch_size
    return [((side, side),)] * len(inputs["pixel_values"])


def _patches(config: Any, inputs: Mapping[str, Any]) -> list[Shown]:
    """One tile a picture, its class token kept or the first token cut off as the config says; -1 is a class token."""
    vision = config.vision_config
    class_tokens = CLASS_TOKENS[vision.model_type]
    first = 1 if config.vision_feature_select_strategy == "default" else 0
    tokens = np.arange(first, (vision.image_size // vision.patch_size) ** 2 + class_tokens)
    return [(tokens - class_tokens, 1)] * len(inputs["pixel_values"])


FAMILY = Family(
    title="LLaVA-1.5",
    model_class="LlavaForConditionalGeneration",
    text_types=LLAMA_LIKE,
    grids=_grids,
    patches=_patches,
    counting=counted_by_patches,
    loop=Loop(
        model_type="llava",
        layout=lambda config, _: OneTile.of(config),
        tower=TowerGeometry.of,
        image_processor=_image_processor,
        image_processors=None,
        projector=("model.multi_modal_projector.",),
    ),
)
