"""LLaVA-OneVision: LLaVA-NeXT's tiles, shrunk where a picture has too many."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import LlavaOnevisionImageProcessorPil

from vtprune_train.core.flops import TowerGeometry
from vtprune_train.models.families.base import LLAMA_LIKE, VIDEO, Family, Loop
from vtprune_train.models.families.layout import Grids, Shown, Size
from vtprune_train.models.families.onevision_layout import OneVision


def _image_processor(config: Any) -> LlavaOnevisionImageProcessorPil:
    tile = config.vision_config.image_size
    return LlavaOnevisionImageProcessorPil(
        size={"height": tile, "width": tile},
        image_grid_pinpoints=[list(point) for point in config.image_grid_pinpoints],
    )


def _counting(config: Any) -> dict[str, Any]:
    vision = config.vision_config
    return {
        "num_image_tokens": (vision.image_size // vision.patch_size) ** 2,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "vision_aspect_ratio": config.vision_aspect_ratio,
    }


def _samples(inputs: Mapping[str, Any]) -> list[list[Size]]:
    """The sizes of each sample's pictures."""
    sizes, counts = inputs["image_sizes"].tolist(), inputs.get("batch_num_images")
    ends = np.cumsum([1] * len(sizes) if counts is None else torch.as_tensor(counts).tolist())
    return [sizes[start:end] for start, end in pairwise([0, *ends])]


def _grids(config: Any, inputs: Mapping[str, Any]) -> list[Grids]:
    layout = OneVision.of(config)
    return [grids for sizes in _samples(inputs) for grids in layout.grids(sizes)]


def _patches(config: Any, inputs: Mapping[str, Any]) -> list[Shown]:
    layout = OneVision.of(config)
    return [shown for sizes in _samples(inputs) for shown in layout.patches(sizes)]


FAMILY = Family(
    title="LLaVA-OneVision",
    model_class="LlavaOnevisionForConditionalGeneration",
    text_types=LLAMA_LIKE,
    grids=_grids,
    patches=_patches,
    counting=_counting,
    refused=(("pixel_values_videos", VIDEO),),
    loop=Loop(
        model_type="llava_onevision",
        layout=lambda config, _: OneVision.of(config),
        tower=TowerGeometry.of,
        image_processor=_image_processor,
        image_processors=("LlavaOnevisionImageProcessor",),
        needs_checkpoint=True,
    ),
)
