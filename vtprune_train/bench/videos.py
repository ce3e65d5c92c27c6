"""The videos of an estimate: their settings and sampled frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from vtprune_train.models.families import trained_family
from vtprune_train.models.families.base import Lacks, required
from vtprune_train.models.families.layout import Clip, ImageGeometry, ImageLayout
from vtprune_train.models.families.videos import video_settings
from vtprune_train.models.io.build import resolve_checkpoint
from vtprune_train.models.io.processors import build_image_processor, saved_video_settings

TYPICAL_FPS = 2.0  # sampled frames per second, if a family samples a number of frames
MOST_TOKENS = 10**6  # of a video; planning needs memory for each token


class VideoSize(NamedTuple):
    """The number of sampled frames of a video, and their size in pixels."""

    frames: int
    width: int
    height: int


def with_videos(
    config: PreTrainedConfig,
    images: ImageGeometry | Lacks,
    source: str | None = None,
    changes: Mapping[str, Any] | None = None,
    max_pixels: int | None = None,
) -> ImageLayout:
    """A copy of the layout of a model's images that also supports videos.

    Args:
        config: the model's config.
        images: the geometry of its images.
        source: folder or hub id of its video settings; ``None`` for the family's.
        changes: the settings in ``data.video`` of a run.
        max_pixels: as in ``model.max_pixels``.

    Raises:
        ValueError: the family does not take videos, or the settings are not supported.
    """
    if isinstance(images, Lacks):
        raise ValueError(f"--video: the tokens of a video cannot be counted ({images.why})")
    family, loop = trained_family(config.model_type, "--video: the model")
    defaults = required(loop.videos, f"--video: {family.title} does not take videos")
    saved = None
    if source is not None:
        path = resolve_checkpoint(source)
        saved = saved_video_settings(path, build_image_processor(config, path, max_pixels))
    assert isinstance(images, ImageLayout)
    return images.with_videos(video_settings(defaults, saved, changes or {}, f"model {source}"))


def clip_of(layout: ImageLayout, size: VideoSize) -> Clip:
    """A video whose frames are all used, at the frame rate that the layout samples.

    Raises:
        ValueError: it has more than :data:`MOST_TOKENS` visual tokens, or the family refuses its size.
    """
    assert layout.video is not None, "the layout was built without videos"
    fps = layout.video.sampling.fps or TYPICAL_FPS
    clip = Clip(size.height, size.width, tuple(range(size.frames)), size.frames, fps)
    if (tokens := layout.video_tokens(clip).total) > MOST_TOKENS:
        raise ValueError(
            f"--video: {size.frames} frames have {tokens} visual tokens; an estimate plans at most {MOST_TOKENS}"
        )
    return clip
