"""LLaVA-OneVision: AnyRes tiles for a single image of a sample, downsampled bilinearly if there are too many features;
one tile per image for several images. A newline feature is appended to every row, or to the single tile.

The model's own ``get_image_features`` computes the features; token counts match ``LlavaOnevisionProcessor``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaOnevisionConfig, LlavaOnevisionImageProcessorPil, Qwen2Config, SiglipVisionConfig

from vtprune_train.models.families.base import LLAMA_LIKE, Family, Loop
from vtprune_train.models.families.known import QWEN2_7B
from vtprune_train.models.families.layout import (
    NEWLINE,
    Grids,
    SampleImages,
    Size,
    TokenPatches,
    VisionInputs,
    tokens_per_tile,
)
from vtprune_train.models.families.llava_next import AnyRes
from vtprune_train.models.families.places import Places, square_edges
from vtprune_train.models.families.pooled_videos import PooledVideos, video_inputs, videos_and_frames
from vtprune_train.models.families.towers import after_features, saved_by_tiles, tile_tower
from vtprune_train.models.families.videos import Sampling, VideoSettings

if TYPE_CHECKING:  # pruning a model does not need Pillow
    from PIL import Image

ASPECT = "anyres_max_"
SHRINK_FROM = 1.1  # grids that exceed the limit by this factor per side are downsampled, as in the published models


@dataclass(frozen=True)
class OneVision(PooledVideos):
    """``anyres`` tiles, with a grid of at most about ``max_tiles`` tiles of features."""

    ends_with_newline: ClassVar[bool] = True

    anyres: AnyRes
    max_tiles: int
    video: VideoSettings | None = None

    @classmethod
    def of(cls, config: Any) -> OneVision:
        """The layout for a ``LlavaOnevisionConfig``.

        Raises:
            ValueError: a setting of the config is not supported, or its pinpoints are not multiples of the tile size.
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
            return [(tile, (1, 1)) for _ in sizes]  # (1, 1): the newline after the tile
        rows, columns = self._grid(sizes[0])
        return [(tile, (rows, columns + 1))]

    def patches(self, sizes: Sequence[Size]) -> list[TokenPatches]:
        """The patch of each token, for the images of one sample; in a downsampled grid, the patch at the token's
        center."""
        base = np.arange(self.anyres.patches_per_tile)
        if len(sizes) != 1:
            return [(np.append(base, NEWLINE), 1) for _ in sizes]
        whole = self.anyres.feature_grid(sizes[0])
        full = self.anyres.visual_index(sizes[0])[len(base) :].reshape(whole[0], whole[1] + 1)[:, :-1]
        rows, columns = (
            (2 * np.arange(kept) + 1) * count // (2 * kept)
            for kept, count in zip(self._grid(sizes[0]), whole, strict=True)
        )
        grid = np.pad(full[np.ix_(rows, columns)], ((0, 0), (0, 1)), constant_values=NEWLINE)
        return [(np.concatenate([base, grid.ravel()]), self.anyres.num_tiles(sizes[0]))]

    def tile_tokens(self, sizes: Sequence[Size]) -> list[tuple[int, ...]]:
        return [tokens_per_tile(patches, self.anyres.patches_per_tile) for patches in self.patches(sizes)]

    def _grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns of features in the grid after downsampling, without newlines."""
        rows, columns = self.anyres.feature_grid(size)
        ratio = math.sqrt(rows * columns / (self.max_tiles * self.anyres.patches_per_tile))
        return (int(rows // ratio), int(columns // ratio)) if ratio > SHRINK_FROM else (rows, columns)

    def tiles(self, sizes: Sequence[Size]) -> list[int]:
        return [self.anyres.num_tiles(size) if len(sizes) == 1 else 1 for size in sizes]

    def pixels(self, image_processor: Any, images: Sequence[Image.Image]) -> list[Tensor]:
        if not images:
            return []
        return list(image_processor(images=[list(images)], return_tensors="pt")["pixel_values"])

    def vision_inputs(self, samples: Sequence[SampleImages]) -> VisionInputs:
        of_images = [images for sample in samples if (images := sample.select(tuple)).sizes]
        with_images = of_images or [self._blank()]
        sizes = [size for sample in with_images for size in sample.sizes]
        counts = tuple(len(sample.sizes) for sample in with_images)
        tokens = [count for sample in of_images for count in self.tokens(sample.sizes)]
        inputs = VisionInputs(
            pixel_values=torch.cat([pixels for sample in with_images for pixels in sample.pixels]),
            visual_index=torch.arange(sum(tokens)),
            image_inputs={"image_sizes": tuple(sizes), "batch_num_images": counts},
        )
        features = sum(sum(self.tokens(sample.sizes)) for sample in with_images)
        return self.with_video_inputs(samples, inputs, features, tokens)

    def model_inputs(self, images: SampleImages) -> dict[str, Tensor]:
        only = images.select(tuple)
        inputs = video_inputs(images)
        if only.sizes:
            inputs |= {**self.anyres.model_inputs(only), "batch_num_images": torch.tensor([len(only.sizes)])}
        return inputs

    def places(self, sizes: Sequence[Size], image_processor: Any) -> list[Places]:
        """Positions of tokens; each of several images is padded to a square and resized to one tile."""
        if len(sizes) == 1:
            return [self.anyres.tiled_places(sizes[0], self._grid(sizes[0]))]
        return [self._square_places(size) for size in sizes]

    def _square_places(self, size: Size) -> Places:
        prepared, tile = self.anyres.tile_edges(1), self.anyres.tile_size
        grid = Places.of_grid(size, *(square_edges(prepared, length, max(size), tile) for length in size))
        newline = [[size[1], 0.0, size[1], size[0]]]
        return Places(size, np.append(grid.kinds, "newline"), np.concatenate([grid.boxes, newline]))

    @property
    def frame_side(self) -> int:
        return pooled_side(self.anyres.patches_per_side)

    def _blank(self) -> SampleImages:
        tile = self.anyres.tile_size
        return SampleImages([(tile, tile)], [torch.zeros(self.anyres.num_tiles((tile, tile)), 3, tile, tile)])

    def examples(self) -> list[Size]:
        """The square resolutions, or all resolutions if none is square."""
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


def pooled_side(patches: int) -> int:
    """Rows (and columns) of a frame's tokens: half as many as ``patches``, rounded up."""
    return -(-patches // 2)


def _videos(config: Any, inputs: Mapping[str, Any]) -> list[tuple[Grids, int]]:
    """For each video, one grid of pooled tokens for each frame, and the newline token at the end."""
    number, frames = videos_and_frames(inputs)
    side = pooled_side(config.vision_config.image_size // config.vision_config.patch_size)
    return [(((side, side),) * frames + ((1, 1),), frames)] * number


def _patches(config: Any, inputs: Mapping[str, Any]) -> list[TokenPatches]:
    layout = OneVision.of(config)
    return [patches for sizes in _samples(inputs, inputs["image_sizes"].tolist()) for patches in layout.patches(sizes)]


def _llava_onevision_7b() -> LlavaOnevisionConfig:
    """The published 7B model. Its vocabulary is Qwen2's (152064) plus two tokens, padded to a multiple of 64."""
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
    videos=_videos,
    loop=Loop(
        layout=lambda config, _: OneVision.of(config),
        image_processor=_image_processor,
        image_processors=("LlavaOnevisionImageProcessor",),
        needs_checkpoint=True,
        saved=saved_by_tiles,
        untrained=after_features,
        videos=VideoSettings(Sampling("even", None, 32), (("height", 384), ("width", 384))),
    ),
)
