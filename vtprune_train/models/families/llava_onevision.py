"""LLaVA-OneVision: AnyRes tiles for an image that is alone in its sample, shrunk bilinearly where there are too many;
one tile an image where there are several. A newline feature ends every row, or the single tile.

The features come from the family's own ``get_image_features``; counted here as ``LlavaOnevisionProcessor`` counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaOnevisionConfig, LlavaOnevisionImageProcessorPil, Qwen2Config, SiglipVisionConfig

from vtprune_train.models.families.base import LLAMA_LIKE, VIDEO, Family, Loop
from vtprune_train.models.families.known import QWEN2_7B
from vtprune_train.models.families.layout import NEWLINE, Grids, ImageLayout, Pictures, Shown, Size, VisionInputs
from vtprune_train.models.families.llava_next import AnyRes
from vtprune_train.models.families.places import Places, square_edges
from vtprune_train.models.families.towers import after_features, saved_by_tiles, tile_tower

if TYPE_CHECKING:  # pruning a model does not need Pillow
    from PIL import Image

ASPECT = "anyres_max_"
SHRINK_FROM = 1.1  # as published: a grid this much too large (per side) is shrunk


@dataclass(frozen=True)
class OneVision(ImageLayout):
    """``anyres`` tiles; a grid keeps about ``max_tiles`` tiles' worth of features."""

    anyres: AnyRes
    max_tiles: int

    @classmethod
    def of(cls, config: Any) -> OneVision:
        """Read a ``LlavaOnevisionConfig``.

        Raises:
            ValueError: a setting under which the features are not a whole grid of patches.
        """
        if config.vision_feature_select_strategy != "full":
            raise ValueError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} is not supported; "
                "LLaVA-OneVision uses 'full' (SigLIP has no class token)"
            )
        number = config.vision_aspect_ratio.removeprefix(ASPECT)
        if not number.isdigit():
            raise ValueError(f"vision_aspect_ratio={config.vision_aspect_ratio!r} is not supported; use {ASPECT}N")
        return cls(AnyRes.of_pinpoints(config), int(number))

    def tokens(self, sizes: Sequence[Size]) -> list[int]:
        if len(sizes) != 1:
            return [self.anyres.patches_per_tile + 1 for _ in sizes]
        rows, columns = self._grid(sizes[0])
        return [self.anyres.patches_per_tile + rows * (columns + 1)]

    def grids(self, sizes: Sequence[Size]) -> list[Grids]:
        tile = (self.anyres.patches_per_side, self.anyres.patches_per_side)
        if len(sizes) != 1:
            return [(tile, (1, 1)) for _ in sizes]  # the newline after the tile
        rows, columns = self._grid(sizes[0])
        return [(tile, (rows, columns + 1))]

    def patches(self, sizes: Sequence[Size]) -> list[Shown]:
        """For the images of one sample, which patch each token shows; of a shrunk grid, the one at its middle."""
        base = np.arange(self.anyres.patches_per_tile)
        if len(sizes) != 1:
            return [(np.append(base, NEWLINE), 1) for _ in sizes]
        whole = self.anyres.feature_grid(sizes[0])
        full = self.anyres.visual_index(sizes[0])[len(base) :].reshape(whole[0], whole[1] + 1)[:, :-1]
        rows, columns = (
            (2 * np.arange(left) + 1) * there // (2 * left)
            for left, there in zip(self._grid(sizes[0]), whole, strict=True)
        )
        shown = np.pad(full[np.ix_(rows, columns)], ((0, 0), (0, 1)), constant_values=NEWLINE)
        return [(np.concatenate([base, shown.ravel()]), self.anyres.num_tiles(sizes[0]))]

    def _grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns of features that remain of the tiles' grid, newlines not counted."""
        rows, columns = self.anyres.feature_grid(size)
        ratio = math.sqrt(rows * columns / (self.max_tiles * self.anyres.patches_per_tile))
        return (int(rows // ratio), int(columns // ratio)) if ratio > SHRINK_FROM else (rows, columns)

    def tiles(self, sizes: Sequence[Size]) -> list[int]:
        return [self.anyres.num_tiles(size) if len(sizes) == 1 else 1 for size in sizes]

    def pixels(self, image_processor: Any, images: Sequence[Image.Image]) -> list[Tensor]:
        if not images:
            return []
        return list(image_processor(images=[list(images)], return_tensors="pt")["pixel_values"])

    def vision_inputs(self, samples: Sequence[Pictures]) -> VisionInputs:
        seen = [sample for sample in samples if sample.sizes] or [self._blank()]
        sizes = [size for sample in seen for size in sample.sizes]
        tokens = sum(sum(self.tokens(sample.sizes)) for sample in samples)
        return VisionInputs(
            pixel_values=torch.cat([pixels for sample in seen for pixels in sample.pixels]),
            visual_index=torch.arange(tokens),
            image_inputs={"image_sizes": tuple(sizes), "batch_num_images": tuple(len(sample.sizes) for sample in seen)},
        )

    def model_inputs(self, pictures: Pictures) -> dict[str, Tensor]:
        count = torch.tensor([len(pictures.sizes)])
        return {**self.anyres.model_inputs(pictures), "batch_num_images": count}

    def places(self, sizes: Sequence[Size], image_processor: Any) -> list[Places]:
        """Of several images each is padded to a square, which one tile holds."""
        if len(sizes) == 1:
            return [self.anyres.tiled_places(sizes[0], self._grid(sizes[0]))]
        return [self._square_places(size) for size in sizes]

    def _square_places(self, size: Size) -> Places:
        prepared, tile = self.anyres.tile_edges(1), self.anyres.tile_size
        grid = Places.of_grid(size, *(square_edges(prepared, length, max(size), tile) for length in size))
        newline = [[size[1], 0.0, size[1], size[0]]]
        return Places(size, np.append(grid.kinds, "newline"), np.concatenate([grid.boxes, newline]))

    def _blank(self) -> Pictures:
        tile = self.anyres.tile_size
        return Pictures([(tile, tile)], [torch.zeros(self.anyres.num_tiles((tile, tile)), 3, tile, tile)])

    def examples(self) -> list[Size]:
        """The square resolutions: from two tiles to more than are kept."""
        return [(height, width) for height, width in self.anyres.pinpoints if height == width] or [
            *self.anyres.pinpoints
        ]


def _image_processor(config: Any) -> LlavaOnevisionImageProcessorPil:
    tile = config.vision_config.image_size
    return LlavaOnevisionImageProcessorPil(
        size={"height": tile, "width": tile},
        image_grid_pinpoints=[list(point) for point in config.image_grid_pinpoints],
    )


def _counting(config: Any) -> dict[str, Any]:
    vision = config.vision_config
    return {
        "num_image_tokens": (vision.image_size // vision.patch_size) ** 2,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "vision_aspect_ratio": config.vision_aspect_ratio,
    }


def _samples(inputs: Mapping[str, Any], sizes: Sequence[Size]) -> list[list[Size]]:
    """The sizes of each sample's images."""
    counts = inputs.get("batch_num_images")
    ends = np.cumsum([1] * len(sizes) if counts is None else torch.as_tensor(counts).tolist())
    return [list(sizes[start:end]) for start, end in pairwise([0, *ends])]


def _grids(config: Any, inputs: Mapping[str, Any]) -> list[Grids]:
    layout = OneVision.of(config)
    return [grids for sizes in _samples(inputs, inputs["image_sizes"].tolist()) for grids in layout.grids(sizes)]


def _patches(config: Any, inputs: Mapping[str, Any]) -> list[Shown]:
    layout = OneVision.of(config)
    return [shown for sizes in _samples(inputs, inputs["image_sizes"].tolist()) for shown in layout.patches(sizes)]


def _llava_onevision_7b() -> LlavaOnevisionConfig:
    """Transformers' conversion script pads the vocabulary of Qwen2 (152064 and two tokens) to a multiple of 64."""
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    return LlavaOnevisionConfig(vision_config=vision, text_config=Qwen2Config(**QWEN2_7B, vocab_size=152128))


FAMILY = Family(
    title="LLaVA-OneVision",
    model_type="llava_onevision",
    model_class="LlavaOnevisionForConditionalGeneration",
    text_types=LLAMA_LIKE,
    grids=_grids,
    patches=_patches,
    samples=_samples,
    counting=_counting,
    flops=tile_tower,
    known={"llava-hf/llava-onevision-qwen2-7b-ov-hf": _llava_onevision_7b},
    refused=(("pixel_values_videos", VIDEO),),
    loop=Loop(
        layout=lambda config, _: OneVision.of(config),
        image_processor=_image_processor,
        image_processors=("LlavaOnevisionImageProcessor",),
        needs_checkpoint=True,
        saved=saved_by_tiles,
        untrained=after_features,
    ),
)
