"""The images and videos of a record: their sizes, from headers, and their pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtprune_train.data.images import MAX_PIXELS, UnreadableImage, image_size, load_image
from vtprune_train.data.videos import FPS, ChangedVideo, load_frames, video_header
from vtprune_train.models.families.layout import Clip, ImageLayout, VideoHeader, Visual

NO_VIDEOS = "it has a video, but its entry of the data has no `videos`; set `videos` to the folder of the videos"


@dataclass(frozen=True)
class VisualFile:
    """One image or video of a record.

    Args:
        name: in messages.
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
        """Raise ``UnreadableImage`` if the header cannot be read."""
        if self.is_video:
            self._header(max_pixels)
        else:
            image_size(self.source, max_pixels=max_pixels, name=self.name)  # type: ignore[arg-type]

    def visual(self, layout: ImageLayout, max_pixels: int = MAX_PIXELS) -> Visual:
        """The size of an image, or the sampled frames of a video, without decoding.

        Args:
            layout: samples videos.
            max_pixels: limit of an image's, or a frame's, ``height * width``.

        Raises:
            UnreadableImage: it cannot be read.
        """
        if not self.is_video:
            return image_size(self.source, max_pixels=max_pixels, name=self.name)  # type: ignore[arg-type]
        header = self._header(max_pixels)
        try:
            return layout.clip(header, self.start, self.end)
        except ValueError as error:
            raise UnreadableImage(self.name, str(error)) from error

    def load(self, visual: Visual, max_pixels: int = MAX_PIXELS) -> Any:
        """The decoded image in RGB, or the sampled frames [T, height, width, 3] uint8.

        Args:
            visual: what :meth:`visual` returned.
            max_pixels: see :meth:`visual`.

        Raises:
            UnreadableImage: it cannot be decoded.
            ChangedImage: it has another size.
        """
        if not isinstance(visual, Clip):
            return load_image(self.source, visual, max_pixels=max_pixels, name=self.name)  # type: ignore[arg-type]
        header = self._header(max_pixels)
        return load_frames(self.source, visual.indices, header, max_pixels=max_pixels, name=self.name)

    def _header(self, max_pixels: int) -> VideoHeader:
        return video_header(self.source, max_pixels=max_pixels, name=self.name, fps=self.fps or FPS)

    def check(self, visual: Visual, height: int, width: int, frames: int, layout: ImageLayout) -> None:
        """Compare a video with its entry in the index.

        Raises:
            ChangedVideo: they differ.
        """
        [tokens] = layout.visual_tokens([visual])
        if isinstance(visual, Clip) and (*visual.size, tokens.frames) != (height, width, frames):
            raise ChangedVideo(
                self.name,
                f"it has {tokens.frames} steps of {visual.height} x {visual.width}, but had {frames} of {height} x "
                f"{width} when the data was indexed",
            )
