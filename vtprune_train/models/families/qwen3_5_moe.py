"""Qwen3.5 with mixtures of experts in the decoder."""

from __future__ import annotations

import dataclasses

from vtprune_train.models.families import qwen3_5
from vtprune_train.models.families.base import NO_BALANCE, Lacks
from vtprune_train.models.families.qwen import MergedPatches

FAMILY = dataclasses.replace(
    qwen3_5.FAMILY,
    title="Qwen3.5-MoE",
    model_type="qwen3_5_moe",
    model_class="Qwen3_5MoeForConditionalGeneration",
    text_types=("qwen3_5_moe_text",),
    known={},
    geometry=MergedPatches.of,
    loop=Lacks(NO_BALANCE),
)
