"""LLaVA-NeXT: a base tile and a grid of tiles, unpadded, with a newline feature behind every row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlavaNextImageProcessorPil

from vtprune_train.core.flops import TowerGeometry
from vtprune_train.models.families.anyres import AnyRes
from vtprune_train.models.families.base import LLAMA_LIKE, Family, Loop, counted_by_patches
from vtprune_train.models.families.layout import Grids, Shown


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


FAMILY = Family(
    title="LLaVA-NeXT",
    model_class="LlavaNextForConditionalGeneration",
    text_types=LLAMA_LIKE,
    grids=_grids,
    patches=_patches,
    counting=counted_by_patches,
    loop=Loop(
        model_type="llava_next",
        layout=lambda config, _: AnyRes.of(config),
        tower=TowerGeometry.of,
        image_processor=_image_processor,
        image_processors=("LlavaNextImageProcessor",),
    ),
)
