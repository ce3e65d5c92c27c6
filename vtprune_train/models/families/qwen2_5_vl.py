"""Qwen2.5-VL: like Qwen2-VL, with window attention and a gated MLP in the vision tower."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2_5_VLConfig

from vtprune_train.core.flops import PatchTowerGeometry
from vtprune_train.models.families.base import Family
from vtprune_train.models.families.known import QWEN2_7B
from vtprune_train.models.families.qwen import merged_grids, merged_videos, patch_loop, patch_tower, rope_index
from vtprune_train.models.families.towers import SavedByTower


def _flops(config: Any) -> PatchTowerGeometry:
    vision = config.vision_config
    return patch_tower(
        config,
        vision.hidden_size,
        vision.intermediate_size,
        vision.out_hidden_size,
        full_layers=len(vision.fullatt_block_indexes),
        window=(vision.window_size // vision.patch_size) ** 2,
        mlp_products=3,
    )


def _saved(config: Any) -> SavedByTower:
    """Activations of RMSNorms and a gated MLP; the values keep the whole output of the fused projection alive."""
    vision = config.vision_config
    c, m = vision.hidden_size, vision.intermediate_size
    return SavedByTower(
        layers=vision.depth,
        tokens=1,
        hidden=c,
        intermediate=m,
        elements=11 * c + 4 * m,
        raw_bytes=8 * c + 8 + 4 * vision.num_heads,
        projector=2 * c + config.text_config.hidden_size // 4,
    )


def _qwen2_5_vl_7b() -> Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    }
    return Qwen2_5_VLConfig(
        text_config={**QWEN2_7B, "vocab_size": 152064, "rope_parameters": rope}, vision_config=vision
    )


FAMILY = Family(
    title="Qwen2.5-VL",
    model_type="qwen2_5_vl",
    model_class="Qwen2_5_VLForConditionalGeneration",
    text_types=("qwen2_5_vl_text",),
    tower="model.visual",
    grids=merged_grids,
    flops=_flops,
    three_part_positions=rope_index,
    videos=merged_videos,
    known={"Qwen/Qwen2.5-VL-7B-Instruct": _qwen2_5_vl_7b},
    loop=patch_loop(_saved),
)
