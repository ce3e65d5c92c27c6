"""Videos of LLaVA-OneVision and LLaVA-NeXT-Video: each frame is one tile, whose features the model's own
``get_video_features`` pools to a smaller grid.

Shape suffixes: V visual tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vtprune_train.core.stream import VIDEO
from vtprune_train.models.families.layout import (
    Clip,
    ImageLayout,
    SampleImages,
    Size,
    VideoHeader,
    VisionInputs,
    Visual,
    VisualTokens,
    check_aspect,
)
from vtprune_train.models.families.places import Places, edges
from vtprune_train.models.families.videos import VideoSettings, crop_offset


class PooledVideos(ImageLayout):
    """The videos of a layout. ``ends_with_newline``: a newline token follows the last frame."""

    ends_with_newline: ClassVar[bool]
    video: VideoSettings | None = None

    @property
    @abstractmethod
    def frame_side(self) -> int:
        """Rows (and columns) of a frame's tokens."""

    def clip(self, header: VideoHeader, start: float | None = None, end: float | None = None) -> Clip:
        check_aspect((header.height, header.width), "a video")
        return super().clip(header, start, end)

    def video_tokens(self, clip: Clip) -> VisualTokens:
        frames, side, newlines = len(clip.indices), self.frame_side, int(self.ends_with_newline)
        grids = ((side, side),) * frames + ((1, 1),) * newlines
        return VisualTokens((frames * side**2 + newlines,), frames, frames, grids)

    def video_pixels(self, clip: Clip, frames: np.ndarray) -> Tensor:
        """[frames, 3, height, width]."""
        assert self.video is not None, "the layout was built without videos"
        return self.video.prepare(frames, self.frame_size(clip))

    def frame_size(self, clip: Clip) -> Size:
        assert self.video is not None, "the layout was built without videos"
        size, (height, width) = self.video.edges, clip.size
        if "height" in size:
            return size["height"], size["width"]
        short, long = size["shortest_edge"], int(size["shortest_edge"] * max(height, width) / min(height, width))
        return (short, long) if height <= width else (long, short)

    def frame_places(self, clip: Clip) -> Places:
        """Positions in the frame; the part outside the central crop belongs to no token."""
        assert self.video is not None, "the layout was built without videos"
        resized = self.frame_size(clip)
        kept = self.video.crop or resized
        sides = []
        for original, whole, cut in zip(clip.size, resized, kept, strict=True):
            prepared = np.linspace(0, cut, self.frame_side + 1)
            sides.append(edges(prepared, original, whole, crop_offset(whole, cut)))
        return Places.of_grid(clip.size, *sides)

    def placeholder(self, visual: Visual) -> str | None:
        return VIDEO if isinstance(visual, Clip) else None

    def with_video_inputs(
        self, samples: Sequence[SampleImages], images: VisionInputs, features: int, image_tokens: Sequence[int]
    ) -> VisionInputs:
        """Add the videos of all samples to the inputs of their images. Without videos, add a blank frame, so that every
        rank runs the tower.

        Args:
            samples: with images and videos.
            images: the inputs of the images alone.
            features: number of features of the images, including newlines and blank images.
            image_tokens: number of visual tokens of each image.
        """
        if self.video is None:
            return images
        videos = [pixels for sample in samples for pixels in sample.select(Clip).pixels]
        frames = torch.cat(videos) if videos else torch.zeros(1, 3, *self._blank_frame())
        per_frame = self.frame_side**2
        newline = [features + len(frames) * per_frame] * int(self.ends_with_newline)
        of_images = iter(np.split(images.visual_index.numpy(), np.cumsum(image_tokens)[:-1]) if image_tokens else ())
        index, done = [np.zeros(0, dtype=np.int64)], features
        for visual, pixels in ((v, p) for sample in samples for v, p in zip(sample.sizes, sample.pixels, strict=True)):
            if not isinstance(visual, Clip):
                index.append(next(of_images))
                continue
            index.append(np.append(np.arange(done, done + len(pixels) * per_frame), newline).astype(np.int64))
            done += len(pixels) * per_frame
        return images._replace(visual_index=torch.from_numpy(np.concatenate(index)), video_pixels=frames.unsqueeze(0))

    def _blank_frame(self) -> tuple[int, int]:
        assert self.video is not None, "the layout was built without videos"
        size = self.video.edges
        square = size.get("height", size.get("shortest_edge", 0)), size.get("width", size.get("shortest_edge", 0))
        return self.video.crop or square


def videos_and_frames(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Number of videos and of the frames of each, from the inputs of ``get_video_features``."""
    pixels = inputs[
        "pixel_values" if "pixel_values" in inputs else "pixel_values_videos"
    ]  # its name in transformers 5.17
    return pixels.shape[0], pixels.shape[1]


def video_inputs(images: SampleImages) -> dict[str, Tensor]:
    """The videos of one sample as keywords of the model's own ``forward``.

    Raises:
        ValueError: the videos do not all have the same number of frames.
    """
    videos = images.select(Clip).pixels
    if len({len(pixels) for pixels in videos}) > 1:
        counts = ", ".join(str(len(pixels)) for pixels in videos)
        raise ValueError(
            f"the videos of a prompt have {counts} frames, but the model needs the same number: set num_frames"
        )
    return {"pixel_values_videos": torch.stack(videos)} if videos else {}
