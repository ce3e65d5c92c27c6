"""The image layout of a run, with videos if its data has any."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from vtprune_train.config.settings import Config
from vtprune_train.models.families.base import Loop, required
from vtprune_train.models.families.layout import ImageLayout, VideoHeader
from vtprune_train.models.families.videos import video_settings
from vtprune_train.models.io.build import resolve_checkpoint
from vtprune_train.models.io.processors import saved_video_settings

# Examples for reports: 480p, 16:9, 30 frames per second.
SHORT_VIDEO = VideoHeader(480, 854, 30 * 30, 30.0, 30.0)
LONG_VIDEO = VideoHeader(480, 854, 30 * 3600, 30.0, 3600.0)


def has_videos(config: Config) -> bool:
    """Whether an entry of the data has a folder of videos."""
    return any(source.videos is not None for which in ("train", "eval") for source in getattr(config.data, which))


def build_layout(
    config: Config, loop: Loop, model_config: PreTrainedConfig, image_processor: Any, path: str | None
) -> ImageLayout:
    """The layout of the images and videos of a run.

    Args:
        config: the run's settings.
        loop: what the loop needs from the model's family.
        model_config: the model's config.
        image_processor: the model's image processor.
        path: the model's checkpoint, whose video settings are used; ``None`` without one.

    Raises:
        ValueError: the data has videos, but the family takes none, or the checkpoint's video settings are unsupported.
    """
    layout = loop.layout(model_config, image_processor)
    if not has_videos(config):
        return layout
    defaults = required(loop.videos, f"the data has videos, but model {path} does not take them")
    saved = saved_video_settings(path if path is None else resolve_checkpoint(path), image_processor)
    return layout.with_videos(video_settings(defaults, saved, config.data.video.model_dump(), f"model {path}"))
