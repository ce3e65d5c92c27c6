"""Sampling of video frames and preparation of their pixels. Frames and pixels are the same as those of transformers'
video processors, which need torchvision; this module does not.

Shape suffixes: T frames.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune_train.models.families.layout import Clip, VideoHeader

MODES = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # Pillow's number of a resampling filter
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

Rule = Literal["qwen2", "qwen3", "middle", "even"]
"""How frames are chosen. ``qwen2``: evenly spaced from the first frame on, a multiple of ``multiple``; ``qwen3``:
evenly spaced from the first to the last frame; ``middle``: the middles of equal parts (InternVL); ``even``: evenly
spaced from the first frame on."""


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video are used.

    Args:
        rule: see :data:`Rule`.
        fps: sampled frames per second; ``None`` if ``num_frames`` is set.
        num_frames: number of sampled frames per video; shorter videos are used whole.
        min_frames, max_frames: limits with ``fps``.
        multiple: number of frames that the tower merges into one step in time.
    """

    rule: Rule
    fps: float | None
    num_frames: int | None
    min_frames: int = 1
    max_frames: int = 768
    multiple: int = 1

    def clip(self, header: VideoHeader, start: float | None = None, end: float | None = None) -> Clip:
        """Sample a video, or its part from ``start`` to ``end`` in seconds (both inclusive).

        Raises:
            ValueError: the part has no frame.
        """
        first, last = header.part(start, end)
        total = last - first + 1
        indices = first + self._indices(total, header.fps)
        return Clip(header.height, header.width, tuple(indices.tolist()), total, header.fps, header)

    def _indices(self, total: int, fps: float) -> np.ndarray:
        count = self._count(total, fps)
        if self.rule == "qwen3":
            return np.linspace(0, total - 1, count).round().astype(np.int64)
        if self.rule == "even":
            return np.arange(count) * total // count
        begin = total / count / 2 if self.rule == "middle" else 0
        # The same expression as in transformers, whose rounding may give one value too many, up to ``total``.
        indices = torch.arange(begin, total, total / count).int().numpy().astype(np.int64)
        return indices[indices < total]

    def _count(self, total: int, fps: float) -> int:
        """Number of frames; at least 1, also of a video that is shorter than ``multiple``."""
        if self.num_frames is not None:
            count = self.num_frames
            if self.rule == "qwen2":
                count = round(count / self.multiple) * self.multiple
            return max(1, min(count, total))
        assert self.fps is not None, "either fps or num_frames is set"
        wanted = total / fps * self.fps
        if self.rule == "qwen2":
            most = math.floor(min(self.max_frames, total) / self.multiple) * self.multiple
            count = math.floor(min(max(wanted, self.min_frames), most, total) / self.multiple) * self.multiple
        else:
            count = min(max(int(wanted), self.min_frames), self.max_frames, total)
        return max(1, count)


@dataclass(frozen=True)
class VideoSettings:
    """How a family samples and prepares videos.

    Args:
        sampling: which frames are used.
        size: what the frames are resized to, as in transformers: ``shortest_edge`` and ``longest_edge`` in pixels of
            area (Qwen), ``height`` and ``width``, or ``shortest_edge`` in pixels of length.
        crop: ``(height, width)`` of a central crop after resizing; ``None`` for no crop.
        mean, std: of each color channel.
        rescale: factor of the 8-bit values.
        resample: Pillow's number of the resampling filter.
        cap_pixels_per_frame, max_video_tokens: limits of a frame's pixels in long videos, as in transformers' Qwen
            processors.
    """

    sampling: Sampling
    size: tuple[tuple[str, int], ...]
    crop: tuple[int, int] | None = None
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    rescale: float = 1 / 255
    resample: int = 3
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 0

    @property
    def edges(self) -> dict[str, int]:
        return dict(self.size)

    def prepare(self, frames: np.ndarray | Tensor, size: tuple[int, int]) -> Tensor:
        """[T, 3, height, width] float32, resized to ``size`` (before the crop) and normalized, from [T, height, width,
        3] uint8."""
        pixels = self.resize(frames, size)
        if self.crop is not None:
            pixels = _cropped(pixels, self.crop)
        mean, std = (torch.tensor(values) * (1.0 / self.rescale) for values in (self.mean, self.std))
        return pixels.float().sub_(mean[:, None, None]).div_(std[:, None, None])

    def resize(self, frames: np.ndarray | Tensor, size: tuple[int, int]) -> Tensor:
        """[T, 3, *size] uint8, from [T, height, width, 3] uint8."""
        pixels = torch.as_tensor(frames).permute(0, 3, 1, 2).contiguous()
        if tuple(pixels.shape[-2:]) == size:
            return pixels
        smooth = {} if self.resample == 0 else {"antialias": True, "align_corners": False}
        return F.interpolate(pixels, size=list(size), mode=MODES[self.resample], **smooth)  # type: ignore[arg-type]


def _cropped(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """The center of ``pixels`` [..., height, width] in this size; smaller frames get a black border.

    Source: ``center_crop`` of transformers' video processors.
    """
    height, width = pixels.shape[-2:]
    top, left = crop_offset(height, size[0]), crop_offset(width, size[1])
    return F.pad(pixels, (left, size[1] - width - left, top, size[0] - height - top))  # negative padding crops


def crop_offset(length: int, cropped: int) -> int:
    """Where a frame begins in its central crop, in pixels along one side; negative if the frame is larger."""
    return (cropped - length) // 2 if cropped > length else -((length - cropped) // 2)


def video_settings(
    defaults: VideoSettings, saved: Mapping[str, Any] | None, changes: Mapping[str, Any], place: str
) -> VideoSettings:
    """A family's settings with those of a checkpoint's video processor and of a run.

    Args:
        defaults: the family's settings, which are the defaults of its class in transformers.
        saved: the checkpoint's ``video_preprocessor_config.json``; ``None`` without one.
        changes: ``fps``, ``num_frames``, ``min_frames``, ``max_frames`` and ``max_pixels`` of the run; ``None`` for the
            checkpoint's.
        place: the checkpoint, for errors.

    Raises:
        ValueError: the checkpoint prepares frames in an unsupported way.
    """
    saved = {key: value for key, value in (saved or {}).items() if value is not None}
    crops = defaults.crop is not None
    for step, wanted in {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": crops}.items():
        if saved.get(step, wanted) is not wanted:
            raise ValueError(f"the video processor of {place} has {step}={saved[step]}; only {wanted} is supported")
    if "min_pixels" in saved or "max_pixels" in saved:  # older checkpoints
        area = {"shortest_edge": saved.get("min_pixels"), "longest_edge": saved.get("max_pixels")}
        saved["size"] = {**defaults.edges, **{edge: n for edge, n in area.items() if n is not None}}
    size = {edge: int(length) for edge, length in saved.get("size", defaults.edges).items() if length is not None}
    if (pixels := changes.get("max_pixels")) is not None:
        if "longest_edge" not in defaults.edges:
            raise ValueError(
                f"data.video.max_pixels={pixels} has no effect on the frames of {place}, whose size is fixed; set it "
                "to null"
            )
        size = {"longest_edge": pixels, "shortest_edge": min(size["shortest_edge"], pixels)}
    if set(size) != set(defaults.edges):
        raise ValueError(f"the video processor of {place} has size={size}; expected {', '.join(defaults.edges)}")
    resample = int(saved.get("resample", defaults.resample))
    if resample not in MODES:
        raise ValueError(f"the video processor of {place} has resample={resample}; supported: {sorted(MODES)}")
    crop = defaults.crop
    if defaults.crop is not None and "crop_size" in saved:
        crop = int(saved["crop_size"]["height"]), int(saved["crop_size"]["width"])
    return VideoSettings(
        _sampling(defaults.sampling, saved, changes),
        tuple(sorted(size.items())),
        crop,
        tuple(saved.get("image_mean", defaults.mean)),
        tuple(saved.get("image_std", defaults.std)),
        float(saved.get("rescale_factor", defaults.rescale)),
        resample,
        bool(saved.get("cap_pixels_per_frame", defaults.cap_pixels_per_frame)),
        int(saved.get("max_video_tokens", defaults.max_video_tokens)),
    )


def _sampling(defaults: Sampling, saved: Mapping[str, Any], changes: Mapping[str, Any]) -> Sampling:
    """Setting ``fps`` or ``num_frames`` replaces the other one."""
    fps, num_frames = defaults.fps, defaults.num_frames
    for settings in (saved, changes):
        if settings.get("num_frames") is not None:
            fps, num_frames = None, int(settings["num_frames"])
        elif settings.get("fps") is not None:
            fps, num_frames = float(settings["fps"]), None
    limits = {
        key: next((int(s[key]) for s in (changes, saved) if s.get(key) is not None), getattr(defaults, key))
        for key in ("min_frames", "max_frames")
    }
    multiple = int(saved.get("temporal_patch_size", defaults.multiple))
    return Sampling(defaults.rule, fps, num_frames, **limits, multiple=multiple)


def timestamps(clip: Clip, multiple: int) -> list[float]:
    """Seconds of each step in time of ``multiple`` frames: the mean of the times of its first and last frame. The last
    frame is repeated to fill a step.

    Source: ``Qwen3VLProcessor`` of transformers.
    """
    indices = [*clip.indices, *[clip.indices[-1]] * (-len(clip.indices) % multiple)]
    seconds = [index / clip.fps for index in indices]
    return [(seconds[i] + seconds[i + multiple - 1]) / 2 for i in range(0, len(seconds), multiple)]


def images_only(visuals: Sequence[Any], title: str) -> None:
    """Raise a ``ValueError`` if a visual is a video."""
    if any(isinstance(visual, Clip) for visual in visuals):
        raise ValueError(f"{title} does not take videos; pass their frames as images")


# Text that becomes one token: a special token, a word, a digit, a space or a punctuation mark.
PIECES = re.compile(r"<\|?(?P<special>/?[A-Za-z_]+)\|?>| ?[^\W\d_]+|\d|\s|[^\w\s]")


def written_tokens(text: str | None) -> int:
    """Number of text tokens that a family writes for a video (timestamps, numbers of frames, delimiters), by the rules
    of Qwen's tokenizers, which split numbers into digits. ``text`` is that of
    :meth:`~vtprune_train.models.families.layout.ImageLayout.placeholder`."""
    special = [piece["special"] for piece in PIECES.finditer(text or "")]
    return len(special) - special.count("video") - special.count("image")
