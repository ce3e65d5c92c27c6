"""The images and videos of a record: their sizes, from headers, and their pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vtprune_train.data.images import MAX_PIXELS, image_size, load_image
from vtprune_train.data.videos import FPS, ChangedVideo, load_frames, video_header
from vtprune_train.models.families.layout import Clip, ImageLayout, VideoHeader, Visual

NO_VIDEOS = "it has a video, but its entry of the data does not set `videos`, the folder of the videos"


@dataclass(frozen=True)
class VisualFile:
    """One image or video of a record.

    Args:
        name: name in error messages.
        source: a file, its content, or for a video also a folder of frames or the files of its frames.
        is_video: whether it is a video.
        start, end: the part of a video in seconds; ``None`` for its start and its end.
        fps: frames per second of a folder or list of frames.
    """

    name: str
    source: Path | bytes | tuple[Path, ...]
    is_video: bool = False
    start: float | None = None
    end: float | None = None
    fps: float | None = None

    @property
    def kind(self) -> str:
        return "video" if self.is_video else "image"

    def check_header(self, max_pixels: int = MAX_PIXELS) -> None:
        """Check what can be checked without the model.

        Raises:
            UnreadableImage: the header cannot be read.
            ValueError: the part of a video has no frame.
        """
        if self.is_video:
            header = self._header(max_pixels)
            try:
                header.part(self.start, self.end)
            except ValueError as error:
                raise ValueError(f"video {self.name}: {error}") from error
        else:
            image_size(self.source, max_pixels=max_pixels, name=self.name)  # type: ignore[arg-type]

    def visual(self, layout: ImageLayout, max_pixels: int = MAX_PIXELS) -> Visual:
        """The size of an image, or the sampled frames of a video, without decoding.

        Args:
            layout: samples videos.
            max_pixels: limit of an image's, or a frame's, ``height * width``.

        Raises:
            UnreadableImage: it cannot be read.
            ValueError: its part has no frame, or the family's processor refuses the size.
        """
        if not self.is_video:
            return image_size(self.source, max_pixels=max_pixels, name=self.name)  # type: ignore[arg-type]
        header = self._header(max_pixels)
        try:
            return layout.clip(header, self.start, self.end)
        except ValueError as error:
            raise ValueError(f"video {self.name}: {error}") from error

    def load(self, visual: Visual, max_pixels: int = MAX_PIXELS, layout: ImageLayout | None = None) -> Any:
        """The decoded image in RGB, or the sampled frames [T, height, width, 3] uint8.

        Args:
            visual: what :meth:`visual` returned.
            max_pixels: see :meth:`visual`.
            layout: resizes the frames of videos while they are decoded; ``None`` for their own size.

        Raises:
            UnreadableImage: it cannot be decoded.
            ChangedImage: its size differs from the index.
        """
        if not isinstance(visual, Clip):
            return load_image(self.source, visual, max_pixels=max_pixels, name=self.name)  # type: ignore[arg-type]
        assert visual.header is not None, "the clip comes from `visual`"
        resize = None if layout is None else partial(layout.resized, visual)
        return load_frames(
            self.source, visual.indices, visual.header, max_pixels=max_pixels, name=self.name, resize=resize
        )

    def _header(self, max_pixels: int) -> VideoHeader:
        is_part = self.start is not None or self.end is not None
        return video_header(self.source, max_pixels=max_pixels, name=self.name, fps=self.fps or FPS, times=is_part)

    def check(self, visual: Visual, height: int, width: int, tokens: int, steps: int, layout: ImageLayout) -> None:
        """Compare a video's frame size and its numbers of visual tokens and steps in time with those in the index.

        Raises:
            ChangedVideo: they differ.
        """
        [now] = layout.visual_tokens([visual])
        if isinstance(visual, Clip) and (*visual.size, now.total, now.frames) != (height, width, tokens, steps):
            raise ChangedVideo(
                self.name,
                f"it has {now.total} visual tokens, from frames of {visual.height} x {visual.width}, but had {tokens}, "
                f"from frames of {height} x {width}, when the data was indexed",
            )
