"""Qwen2-VL: images of any size, with (time, height, width) positions that stay with their tokens."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2VLConfig

from vtprune_train.core.flops import PatchTowerGeometry
from vtprune_train.models.families.base import Family
from vtprune_train.models.families.known import QWEN2_7B
from vtprune_train.models.families.qwen import (
    merged_grids,
    merged_videos,
    patch_loop,
    patch_tower,
    rope_index,
    saved_by_patches,
)
from vtprune_train.models.families.towers import SavedByTower


def _qwen2_vl_7b() -> Qwen2VLConfig:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision = {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return Qwen2VLConfig(text_config={**QWEN2_7B, "vocab_size": 152064, "rope_parameters": rope}, vision_config=vision)


def _flops(config: Any) -> PatchTowerGeometry:
    vision = config.vision_config
    return patch_tower(config, vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio), vision.hidden_size)


def _saved(config: Any) -> SavedByTower:
    vision = config.vision_config
    per_mlp = 3 if vision.hidden_act == "quick_gelu" else 2
    return saved_by_patches(config, vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio), per_mlp)


FAMILY = Family(
    title="Qwen2-VL",
    model_type="qwen2_vl",
    model_class="Qwen2VLForConditionalGeneration",
    text_types=("qwen2_vl_text",),
    tower="model.visual",
    grids=merged_grids,
    flops=_flops,
    three_part_positions=rope_index,
    videos=merged_videos,
    known={"Qwen/Qwen2-VL-7B-Instruct": _qwen2_vl_7b},
    loop=patch_loop(_saved),
)
