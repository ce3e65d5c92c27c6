"""Qwen2-VL: images of any size, with (time, height, width) positions that stay with their tokens."""

from __future__ import annotations

from typing import Any

from vtprune_train.core.flops import PatchTowerGeometry
from vtprune_train.models.families.base import Family
from vtprune_train.models.families.qwen import MergedPatches, merged_grids, merged_videos, patch_tower, rope_index


def _flops(config: Any) -> PatchTowerGeometry:
    vision = config.vision_config
    return patch_tower(config, vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio), vision.hidden_size)


FAMILY = Family(
    title="Qwen2-VL",
    model_type="qwen2_vl",
    model_class="Qwen2VLForConditionalGeneration",
    text_types=("qwen2_vl_text",),
    tower="model.visual",
    grids=merged_grids,
    geometry=MergedPatches.of,
    flops=_flops,
    three_part_positions=rope_index,
    videos=merged_videos,
)
