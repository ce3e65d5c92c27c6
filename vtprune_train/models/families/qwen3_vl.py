"""Qwen3-VL: like Qwen2-VL, with features of deeper vision layers that are added after the first decoder layers and
gathered with their tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

from vtprune_train.core.flops import PatchTowerGeometry
from vtprune_train.models.families import qwen2_vl
from vtprune_train.models.families.qwen import patch_tower


def _flops(config: Any) -> PatchTowerGeometry:
    vision = config.vision_config
    mergers = 1 + len(vision.deepstack_visual_indexes)
    return patch_tower(config, vision.hidden_size, vision.intermediate_size, vision.out_hidden_size, mergers=mergers)


FAMILY = dataclasses.replace(
    qwen2_vl.FAMILY,
    title="Qwen3-VL",
    model_type="qwen3_vl",
    model_class="Qwen3VLForConditionalGeneration",
    text_types=("qwen3_vl_text",),
    flops=_flops,
)
