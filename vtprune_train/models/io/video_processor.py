"""A replacement for transformers' video processors, which need torchvision: computes the pixels and metadata from which
a family's processor creates the text and inputs of videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from transformers import BatchFeature
from transformers.video_utils import VideoMetadata, make_batched_videos

from vtprune_train.models.families import family_of_type
from vtprune_train.models.families.base import Lacks, required
from vtprune_train.models.families.layout import Clip, ImageLayout, SampleImages
from vtprune_train.models.families.pooled_videos import video_inputs
from vtprune_train.models.families.videos import video_settings

# Accepted keywords and values: metadata and tensors are always returned, and frames were sampled before decoding.
FIXED = {"return_metadata": (True, False), "return_tensors": ("pt", None), "do_sample_frames": (False, None)}


@dataclass(frozen=True)
class DecodedVideo:
    """The sampled frames of a video, [T, height, width, 3] uint8 RGB, and what they were sampled from."""

    clip: Clip
    frames: np.ndarray

    @property
    def metadata(self) -> VideoMetadata:
        clip = self.clip
        return VideoMetadata(
            total_num_frames=clip.total,
            fps=clip.fps,
            width=clip.width,
            height=clip.height,
            duration=clip.total / clip.fps,
            frames_indices=list(clip.indices),
        )


class VideoProcessor:
    """Prepares videos like the training loop. Has the attributes that transformers' processors read.

    Args:
        config: the model's config.
        image_processor: the model's image processor.
        saved: settings of the checkpoint's video processor.
        changes: see :func:`~vtprune_train.models.families.videos.video_settings`.
        place: the checkpoint, for errors.
    """

    model_input_names = ("pixel_values_videos",)

    def __init__(
        self, config: Any, image_processor: Any, saved: Mapping[str, Any], changes: Mapping[str, Any] | None, place: str
    ):
        self._config, self._image_processor, self._place = config, image_processor, place
        self._saved, self._changes = dict(saved), None if changes is None else dict(changes)

    def __deepcopy__(self, memo: Any) -> VideoProcessor:
        return self  # immutable

    @cached_property
    def layout(self) -> ImageLayout:
        """The family's layout with these settings.

        Raises:
            ValueError: the settings do not fit the model.
        """
        family = family_of_type(self._config.model_type)
        assert family is not None and not isinstance(family.loop, Lacks)
        defaults = required(family.loop.videos, family.title)
        settings = video_settings(defaults, self._saved, self._changes or {}, self._place)
        return family.loop.layout(self._config, self._image_processor).with_videos(settings)

    @property
    def merge_size(self) -> int:
        """Patches per side that are merged to a token (Qwen)."""
        return self.layout.merge_size  # type: ignore[attr-defined, no-any-return]

    @property
    def temporal_patch_size(self) -> int:
        """Frames in a step in time (Qwen)."""
        return self.layout.temporal_patch_size  # type: ignore[attr-defined, no-any-return]

    def changed(self, fps: float | None = None, num_frames: int | None = None) -> VideoProcessor:
        """A copy with another rate or number of sampled frames; setting one replaces the other.

        Raises:
            ValueError: both are set, or one is not positive.
        """
        if fps is None and num_frames is None:
            return self
        if fps is not None and num_frames is not None:
            raise ValueError(f"fps={fps} and num_frames={num_frames} are both set; leave one of them out")
        if (fps is not None and not 0 < fps < float("inf")) or (num_frames is not None and num_frames < 1):
            raise ValueError(
                f"fps={fps} must be above 0" if num_frames is None else f"num_frames={num_frames} must be above 0"
            )
        changes = {**(self._changes or {}), "fps": fps, "num_frames": num_frames}
        return VideoProcessor(self._config, self._image_processor, self._saved, changes, self._place)

    def to_dict(self) -> dict[str, Any]:
        """The settings to save: those of the checkpoint, with the sampling and size of the run."""
        if self._changes is None:
            return dict(self._saved)
        saved = {key: value for key, value in self._saved.items() if key not in ("min_pixels", "max_pixels")}
        sampling = self.layout.video.sampling
        saved |= {"do_sample_frames": True, "fps": sampling.fps, "num_frames": sampling.num_frames}
        if sampling.fps is not None:
            saved |= {"min_frames": sampling.min_frames, "max_frames": sampling.max_frames}
        return {**saved, "size": self.layout.video.edges}

    def __call__(self, videos: Any, video_metadata: Any = None, **keywords: Any) -> BatchFeature:
        """The inputs of videos.

        Args:
            videos: frames of each video, [T, height, width, 3] uint8.
            video_metadata: for each video, ``total_num_frames`` and ``fps`` of the file and the ``frames_indices``.

        Returns:
            ``pixel_values_videos``, ``video_metadata``, and ``video_grid_thw`` in families with patches.

        Raises:
            ValueError: the metadata is missing, or the model needs the same number of frames in all videos.
        """
        for name, value in keywords.items():
            if value not in FIXED.get(name, ()):
                raise ValueError(f"{name}={value!r} is not supported for videos; use the settings of the checkpoint")
        frames = [np.asarray(video) for video in make_batched_videos(videos)]
        clips = _clips(frames, video_metadata)
        pixels = [self.layout.video_pixels(clip, of) for clip, of in zip(clips, frames, strict=True)]
        sample = SampleImages(list(clips), pixels)
        data = video_inputs(sample) if self.layout.stacks_videos else self.layout.model_inputs(sample)
        data.pop("second_per_grid_ts", None)  # the processor writes it from the metadata
        metadata = [DecodedVideo(clip, of).metadata for clip, of in zip(clips, frames, strict=True)]
        return BatchFeature({**data, "video_metadata": metadata}, skip_tensor_conversion=["video_metadata"])


def _clips(frames: Sequence[np.ndarray], metadata: Any) -> list[Clip]:
    described = _flat(metadata)
    if len(described) != len(frames) or not all(map(_is_complete, described)):
        raise ValueError(
            f"{len(frames)} video(s) need as many video_metadata, each with fps, total_num_frames and frames_indices; "
            "vtprune_train.evaluation.videos.open_video reads a file with them"
        )
    for of, video in zip(described, frames, strict=True):
        if len(of["frames_indices"]) != len(video):
            raise ValueError(f"a video has {len(video)} frames, but {len(of['frames_indices'])} frames_indices")
    return [
        Clip(video.shape[1], video.shape[2], tuple(of["frames_indices"]), of["total_num_frames"], of["fps"])
        for of, video in zip(described, frames, strict=True)
    ]


def _flat(metadata: Any) -> list[Any]:
    """The metadata of each video, which processors nest like the videos."""
    if isinstance(metadata, list | tuple):
        return [of for part in metadata for of in _flat(part)]
    return [] if metadata is None else [metadata]


def _is_complete(metadata: Any) -> bool:
    if not isinstance(metadata, Mapping):
        return False
    return metadata.get("frames_indices") is not None and all(metadata.get(key) for key in ("fps", "total_num_frames"))


def video_keywords(videos: Sequence[DecodedVideo]) -> dict[str, Any]:
    """Keywords of a processor's call for these videos; empty without videos."""
    if not videos:
        return {}
    return {
        "videos": [video.frames for video in videos],
        "video_metadata": [video.metadata for video in videos],
        "do_sample_frames": False,
    }
