"""LLaVA-NeXT: a base tile and a grid of tiles, unpadded, with a newline feature after every row (see ``anyres.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlavaNextConfig, LlavaNextImageProcessorPil

from vtprune_train.models.families.anyres import AnyRes
from vtprune_train.models.families.base import LLAMA_LIKE, Family, Loop
from vtprune_train.models.families.known import clip_large_336, vicuna_7b
from vtprune_train.models.families.layout import Grids, Shown
from vtprune_train.models.families.towers import after_features, counted_by_patches, saved_by_tiles, tile_tower


def _image_processor(config: Any) -> LlavaNextImageProcessorPil:
    tile = config.vision_config.image_size
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        image_grid_pinpoints=[list(point) for point in config.image_grid_pinpoints],
    )


def _grids(config: Any, inputs: Mapping[str, Any]) -> list[Grids]:
    return AnyRes.of(config).grids(inputs["image_sizes"].tolist())


def _patches(config: Any, inputs: Mapping[str, Any]) -> list[Shown]:
    layout = AnyRes.of_pinpoints(config)
    sizes = inputs["image_sizes"].tolist()
    return [(layout.visual_index(size), layout.num_tiles(size)) for size in sizes]


def _llava_next_vicuna_7b() -> LlavaNextConfig:
    return LlavaNextConfig(
        text_config=vicuna_7b(vocab_size=32064),
        vision_config=clip_large_336(),
        image_token_index=32000,
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        image_seq_length=576,
        tie_word_embeddings=False,
    )


FAMILY = Family(
    title="LLaVA-NeXT",
    model_type="llava_next",
    model_class="LlavaNextForConditionalGeneration",
    text_types=LLAMA_LIKE,
    grids=_grids,
    patches=_patches,
    counting=counted_by_patches,
    flops=tile_tower,
    not_original=None,
    known={"llava-hf/llava-v1.6-vicuna-7b-hf": _llava_next_vicuna_7b},
    loop=Loop(
        layout=lambda config, _: AnyRes.of(config),
        image_processor=_image_processor,
        image_processors=("LlavaNextImageProcessor",),
        saved=saved_by_tiles,
        untrained=after_features,
    ),
)
