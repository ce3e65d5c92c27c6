"""Qwen2.5-VL: as Qwen2-VL, with another vision tower."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2VLImageProcessorPil

from vtprune_train.core.flops import WindowedTowerGeometry
from vtprune_train.core.stream import IMAGE
from vtprune_train.models.families.base import VIDEO, Family, Loop, merged_grids, rope_index
from vtprune_train.models.families.qwen_layout import MergedPatches


def _image_processor(config: Any) -> Qwen2VLImageProcessorPil:
    vision = config.vision_config
    return Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
    )


FAMILY = Family(
    title="Qwen2.5-VL",
    model_class="Qwen2_5_VLForConditionalGeneration",
    text_types=("qwen2_5_vl_text",),
    tower="model.visual",
    grids=merged_grids,
    three_part_positions=rope_index,
    refused=(("pixel_values_videos", VIDEO),),
    loop=Loop(
        model_type="qwen2_5_vl",
        layout=MergedPatches.of,
        tower=WindowedTowerGeometry.of,
        image_processor=_image_processor,
        image_processors=("Qwen2VLImageProcessor",),
        vision="model.visual.",
        projector=("model.visual.merger.",),
        image_token="<|image_pad|>",
        placeholder=f"<|vision_start|>{IMAGE}<|vision_end|>",
        needs_checkpoint=True,
    ),
)
