"""Qwen3-VL with mixtures of experts in the decoder."""

from __future__ import annotations

import dataclasses

from vtprune_train.models.families import qwen3_vl
from vtprune_train.models.families.base import NO_BALANCE, Lacks
from vtprune_train.models.families.qwen import MergedPatches

FAMILY = dataclasses.replace(
    qwen3_vl.FAMILY,
    title="Qwen3-VL-MoE",
    model_type="qwen3_vl_moe",
    model_class="Qwen3VLMoeForConditionalGeneration",
    text_types=("qwen3_vl_moe_text",),
    known={},
    geometry=MergedPatches.of,
    loop=Lacks(NO_BALANCE),
)
