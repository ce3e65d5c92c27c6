"""Qwen3-VL: as Qwen2-VL; features of deeper vision layers enter after the first decoder layers, and are gathered with
their tokens."""

from __future__ import annotations

from typing import Any

from vtprune_train.core.flops import PatchTowerGeometry
from vtprune_train.models.families.base import VIDEO, Family
from vtprune_train.models.families.qwen import MergedPatches, merged_grids, patch_tower, rope_index


def _flops(config: Any) -> PatchTowerGeometry:
    vision = config.vision_config
    mergers = 1 + len(vision.deepstack_visual_indexes)
    return patch_tower(config, vision.hidden_size, vision.intermediate_size, vision.out_hidden_size, mergers=mergers)


FAMILY = Family(
    title="Qwen3-VL",
    model_type="qwen3_vl",
    model_class="Qwen3VLForConditionalGeneration",
    text_types=("qwen3_vl_text",),
    tower="model.visual",
    grids=merged_grids,
    geometry=MergedPatches.of,
    flops=_flops,
    three_part_positions=rope_index,
    refused=(("pixel_values_videos", VIDEO),),
)
