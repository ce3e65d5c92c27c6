"""LLaVA-OneVision: LLaVA-NeXT's tiles, shrunk where a picture has too many."""

from __future__ import annotations

from typing import Any

from transformers import LlavaOnevisionImageProcessorPil

from vtprune_train.flops import TowerGeometry
from vtprune_train.models.families.apart import ApartProcessor
from vtprune_train.models.families.base import LLAMA_LIKE, VIDEO, Family, Loop
from vtprune_train.models.layouts.onevision import OneVision
from vtprune_train.stream import IMAGE


def _image_processor(config: Any) -> LlavaOnevisionImageProcessorPil:
    tile = config.vision_config.image_size
    return LlavaOnevisionImageProcessorPil(
        size={"height": tile, "width": tile},
        image_grid_pinpoints=[list(point) for point in config.image_grid_pinpoints],
    )


def _processor(config: Any, tokenizer: Any, image_processor: Any) -> ApartProcessor:
    vision = config.vision_config
    settings = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": (vision.image_size // vision.patch_size) ** 2,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "vision_aspect_ratio": config.vision_aspect_ratio,
        "image_token": IMAGE,
    }
    return ApartProcessor(image_processor, tokenizer, settings)


FAMILY = Family(
    title="LLaVA-OneVision",
    model_class="LlavaOnevisionForConditionalGeneration",
    text_types=LLAMA_LIKE,
    refused=(("pixel_values_videos", VIDEO),),
    loop=Loop(
        model_type="llava_onevision",
        layout=lambda config, _: OneVision.of(config),
        tower=TowerGeometry.of,
        image_processor=_image_processor,
        processor=_processor,
        needs_checkpoint=True,
    ),
)
