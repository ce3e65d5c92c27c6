"""LLaVA-NeXT-Video: images as in LLaVA-NeXT; each frame of a video is one tile, pooled by ``spatial_pool_stride``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import LlavaNextVideoConfig

from vtprune_train.models.families import llava_next
from vtprune_train.models.families.base import LLAMA_LIKE, Family, Loop
from vtprune_train.models.families.known import llava_vicuna_7b
from vtprune_train.models.families.layout import Grids, SampleImages, VisionInputs
from vtprune_train.models.families.llava_next import AnyRes
from vtprune_train.models.families.pooled_videos import PooledVideos, video_inputs, videos_and_frames
from vtprune_train.models.families.towers import (
    after_features,
    check_class_token_is_dropped,
    counted_by_patches,
    patch_grid,
    saved_by_tiles,
    tile_tower,
)
from vtprune_train.models.families.videos import Sampling, VideoSettings


@dataclass(frozen=True)
class NextVideo(AnyRes, PooledVideos):
    """AnyRes tiles, and frames of ``patches_per_side // stride`` rows and columns of tokens."""

    ends_with_newline: ClassVar[bool] = False

    stride: int = 2
    video: VideoSettings | None = None

    @classmethod
    def of(cls, config: Any) -> NextVideo:
        """The layout for a ``LlavaNextVideoConfig``.

        Raises:
            ValueError: the config keeps the class token, or its pinpoints are not multiples of the tile size.
        """
        check_class_token_is_dropped(config)
        images = AnyRes.of_pinpoints(config)
        return cls(images.pinpoints, images.tile_size, images.patch_size, config.spatial_pool_stride)

    @property
    def frame_side(self) -> int:
        return self.patches_per_side // self.stride

    def vision_inputs(self, samples: Sequence[SampleImages]) -> VisionInputs:
        images = [sample.select(tuple) for sample in samples]
        inputs = super().vision_inputs(images)
        features = len(inputs.pixel_values) * self.patches_per_tile + 1  # one newline after all features
        return self.with_video_inputs(samples, inputs, features, [n for i in images for n in self.tokens(i.sizes)])

    def model_inputs(self, images: SampleImages) -> dict[str, Tensor]:
        only = images.select(tuple)
        return {**video_inputs(images), **(super().model_inputs(only) if only.sizes else {})}


def _videos(config: Any, inputs: Mapping[str, Any]) -> list[tuple[Grids, int]]:
    """For each video, one grid of pooled tokens for each frame."""
    number, frames = videos_and_frames(inputs)
    side = patch_grid(config.vision_config)[0] // config.spatial_pool_stride
    return [(((side, side),) * frames, frames)] * number


FAMILY = Family(
    title="LLaVA-NeXT-Video",
    model_type="llava_next_video",
    model_class="LlavaNextVideoForConditionalGeneration",
    text_types=LLAMA_LIKE,
    grids=lambda config, inputs: AnyRes.of_pinpoints(config).grids(inputs["image_sizes"].tolist()),
    videos=_videos,
    patches=llava_next.patches_of_images,
    counting=counted_by_patches,
    flops=tile_tower,
    known={
        "llava-hf/LLaVA-NeXT-Video-7B-hf": lambda: llava_vicuna_7b(
            LlavaNextVideoConfig, 32001, image_grid_pinpoints=llava_next.PINPOINTS, video_token_index=32000
        )
    },
    loop=Loop(
        layout=lambda config, _: NextVideo.of(config),
        image_processor=llava_next.image_processor,
        image_processors=("LlavaNextImageProcessor",),
        projector=("model.multi_modal_projector.", "model.image_newline", "model.vision_resampler."),
        saved=saved_by_tiles,
        untrained=after_features,
        videos=VideoSettings(Sampling("even", None, 8), (("shortest_edge", 336),), crop=(336, 336)),
    ),
)
