"""Qwen3.5: three of four decoder layers have linear attention (gated delta rule), the others attend; the vision tower
is that of Qwen3-VL without features of deeper layers."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2VLImageProcessorPil

from vtprune_train.core.flops import PatchTowerGeometry
from vtprune_train.core.stream import IMAGE
from vtprune_train.models.families.base import VIDEO, Family, Loop
from vtprune_train.models.families.qwen import MergedPatches, merged_grids, patch_tower, rope_index
from vtprune_train.models.families.towers import SavedByTower

PIXELS = {"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096}  # of the published checkpoints


def _image_processor(config: Any) -> Qwen2VLImageProcessorPil:
    vision = config.vision_config
    return Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        size=PIXELS,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def _flops(config: Any) -> PatchTowerGeometry:
    vision = config.vision_config
    return patch_tower(config, vision.hidden_size, vision.intermediate_size, vision.out_hidden_size)


def _saved(config: Any) -> SavedByTower:
    """Activations of LayerNorms and an MLP; the values keep the whole output of the fused projection alive."""
    vision = config.vision_config
    c, m = vision.hidden_size, vision.intermediate_size
    return SavedByTower(
        layers=vision.depth,
        tokens=1,
        hidden=c,
        intermediate=m,
        elements=11 * c + 2 * m,
        raw_bytes=16 + 4 * vision.num_heads,
        projector=3 * c + config.text_config.hidden_size // 4,
    )


FAMILY = Family(
    title="Qwen3.5",
    model_type="qwen3_5",
    model_class="Qwen3_5ForConditionalGeneration",
    text_types=("qwen3_5_text",),
    tower="model.visual",
    grids=merged_grids,
    flops=_flops,
    three_part_positions=rope_index,
    refused=(("pixel_values_videos", VIDEO),),
    loop=Loop(
        layout=MergedPatches.of,
        image_processor=_image_processor,
        image_processors=("Qwen2VLImageProcessor",),
        saved=_saved,
        vision="model.visual.",
        projector=("model.visual.merger.",),
        image_token="<|image_pad|>",
        placeholder=f"<|vision_start|>{IMAGE}<|vision_end|>",
        needs_checkpoint=True,
    ),
)
