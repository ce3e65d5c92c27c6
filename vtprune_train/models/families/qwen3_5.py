"""Qwen3.5: three of every four decoder layers have linear attention (gated delta rule). The vision tower is that of
Qwen3-VL without DeepStack."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import Qwen3_5Config

from vtprune_train.core.flops import PatchTowerGeometry
from vtprune_train.models.families import qwen3_vl
from vtprune_train.models.families.qwen import patch_tower, saved_by_patches
from vtprune_train.models.families.towers import SavedByTower


def _flops(config: Any) -> PatchTowerGeometry:
    vision = config.vision_config
    return patch_tower(config, vision.hidden_size, vision.intermediate_size, vision.out_hidden_size)


def _saved(config: Any) -> SavedByTower:
    vision = config.vision_config
    return saved_by_patches(config, vision.hidden_size, vision.intermediate_size, 2)


def _qwen3_5_9b() -> Qwen3_5Config:
    """transformers' defaults, which are the sizes of this checkpoint."""
    return Qwen3_5Config(vision_config={"out_hidden_size": 4096})


FAMILY = dataclasses.replace(
    qwen3_vl.FAMILY,
    title="Qwen3.5",
    model_type="qwen3_5",
    model_class="Qwen3_5ForConditionalGeneration",
    text_types=("qwen3_5_text",),
    flops=_flops,
    known={"Qwen/Qwen3.5-9B": _qwen3_5_9b},
    loop=dataclasses.replace(qwen3_vl.LOOP, saved=_saved, projector=("model.visual.merger.",)),
)
