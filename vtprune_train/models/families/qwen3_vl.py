"""Qwen3-VL: like Qwen2-VL, with features of deeper vision layers that are added after the first decoder layers and
gathered with their tokens."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from transformers import Qwen2VLImageProcessorPil, Qwen3VLConfig

from vtprune_train.core.flops import PatchTowerGeometry
from vtprune_train.models.families import qwen2_vl
from vtprune_train.models.families.qwen import (
    CLIPS_OF_ANY_SIZE,
    MergedPatches,
    image_processor,
    patch_loop,
    patch_tower,
    saved_by_patches,
)
from vtprune_train.models.families.towers import SavedByTower

SIZE = {"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096}  # areas in pixels, of the published checkpoints
HALF = [0.5, 0.5, 0.5]  # their mean and standard deviation


def _mergers(config: Any) -> int:
    return 1 + len(config.vision_config.deepstack_visual_indexes)


def _flops(config: Any) -> PatchTowerGeometry:
    vision = config.vision_config
    return patch_tower(
        config, vision.hidden_size, vision.intermediate_size, vision.out_hidden_size, mergers=_mergers(config)
    )


def _saved(config: Any) -> SavedByTower:
    vision = config.vision_config
    return saved_by_patches(config, vision.hidden_size, vision.intermediate_size, 2, _mergers(config))


def _image_processor(config: Any) -> Qwen2VLImageProcessorPil:
    return image_processor(config, size=SIZE, image_mean=HALF, image_std=HALF)


def _qwen3_vl_8b() -> Qwen3VLConfig:
    text = {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": 4096,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


LOOP = patch_loop(
    _saved,
    layout=partial(MergedPatches.of, timestamps=True),
    image_processor=_image_processor,
    videos=CLIPS_OF_ANY_SIZE,
    projector=("model.visual.merger.", "model.visual.deepstack_merger_list."),
)

FAMILY = dataclasses.replace(
    qwen2_vl.FAMILY,
    title="Qwen3-VL",
    model_type="qwen3_vl",
    model_class="Qwen3VLForConditionalGeneration",
    text_types=("qwen3_vl_text",),
    flops=_flops,
    known={"Qwen/Qwen3-VL-8B-Instruct": _qwen3_vl_8b},
    loop=LOOP,
)
