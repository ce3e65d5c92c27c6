"""Image layouts: how a family divides images into tiles and visual tokens, and how the collator packs them. Host only.

Shape suffixes: T tokens in the packed batch, V visual tokens, P tiles (or patches, where a family has no tiles).
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vtprune_train.core.stream import SegmentLayout
from vtprune_train.models.families.places import Places, grid_places

if TYPE_CHECKING:  # pruning a model does not need Pillow
    from PIL import Image

NEWLINE = -1
TOLERANCE = 1e-6  # of times in frames or seconds
MAX_ASPECT = 200  # Qwen's limit; CLIP's processor would scale the SHORT side to a whole tile

Size = tuple[int, int]
"""``(height, width)`` of an image in pixels."""


@dataclass(frozen=True)
class VideoHeader:
    """The header of a video.

    Args:
        height, width: of a frame in pixels, after rotation.
        frames: number of frames.
        fps: mean number of frames per second.
        duration: in seconds.
        times: seconds of each frame after the first one, if their rate is not constant; ``None`` if it is constant or
            not known.
    """

    height: int
    width: int
    frames: int
    fps: float
    duration: float
    times: tuple[float, ...] | None = None

    def part(self, start: float | None, end: float | None) -> tuple[int, int]:
        """The first and the last frame from ``start`` to ``end`` in seconds (both inclusive; ``None`` for the start and
        the end of the video).

        Raises:
            ValueError: there is no frame between them.
        """
        first, last = 0, self.frames - 1
        if self.times is None:
            first = first if start is None else math.ceil(start * self.fps - TOLERANCE)
            last = last if end is None else min(last, math.floor(end * self.fps + TOLERANCE))
        else:
            first = first if start is None else bisect_left(self.times, start - TOLERANCE)
            last = last if end is None else bisect_right(self.times, end + TOLERANCE) - 1
        if first > last:
            raise ValueError(
                f"no frame lies between start={start} and end={end}; the video has {self.frames} frames in "
                f"{self.duration:.2f} s"
            )
        return first, last


@dataclass(frozen=True)
class Clip:
    """The sampled frames of a video.

    Args:
        height, width: of a frame in pixels.
        indices: the frames, counted from the start of the file.
        total: number of frames in the part of the video that they were sampled from.
        fps: mean number of frames per second of the file.
        header: the header that they were sampled from; ``None`` if the frames do not come from a file.
    """

    height: int
    width: int
    indices: tuple[int, ...]
    total: int
    fps: float
    header: VideoHeader | None = field(default=None, compare=False, repr=False)

    @property
    def size(self) -> Size:
        return self.height, self.width

    @property
    def sampled_fps(self) -> float:
        """Number of sampled frames per second."""
        return len(self.indices) / self.total * self.fps


Visual = Size | Clip
"""The size of an image, or a video."""
Grids = tuple[tuple[int, int], ...]
"""See :class:`~vtprune_train.core.stream.ImageSpan`."""
TokenPatches = tuple[np.ndarray, int]
"""The patch of its image that each visual token represents ([V] int64, or ``NEWLINE``), and the image's number of
tiles."""


@dataclass
class SampleImages:
    """The images and videos of one sample, in the order of their placeholders: their sizes, and the vision tower's
    input for each ([tiles, ...] float32)."""

    sizes: list[Any]
    pixels: list[Tensor]

    def select(self, kind: type) -> SampleImages:
        """Only the videos (``Clip``) or only the images (``tuple``)."""
        chosen = [number for number, size in enumerate(self.sizes) if isinstance(size, kind)]
        return SampleImages([self.sizes[n] for n in chosen], [self.pixels[n] for n in chosen])


class VisionInputs(NamedTuple):
    """The fields of a :class:`~vtprune_train.core.stream.PackedBatch` that describe images and videos."""

    pixel_values: Tensor
    visual_index: Tensor
    image_inputs: dict[str, Any] | None = None
    video_pixels: Tensor | None = None


class VisualTokens(NamedTuple):
    """The visual tokens of one image or video.

    Args:
        runs: length of each run of adjacent tokens; an image has one.
        tiles: number of tiles (or patches, where a family has no tiles).
        frames, grids, tile_tokens: see :class:`~vtprune_train.core.stream.ImageSpan`. If ``frames`` is 0, each run is
            an image.
    """

    runs: tuple[int, ...]
    tiles: int = 0
    frames: int = 0
    grids: Grids = ()
    tile_tokens: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """Number of visual tokens."""
        return sum(self.runs)


class ImageGeometry(ABC):
    """How a family divides images into tiles and visual tokens. For families without tiles, ``tiles`` are patches."""

    unit: ClassVar[str] = "tiles"

    @abstractmethod
    def tokens(self, sizes: Sequence[Size]) -> list[int]:
        """Number of visual tokens of each image of one sample.

        Raises:
            ValueError: the family's image processor refuses a size.
        """

    @abstractmethod
    def tiles(self, sizes: Sequence[Size]) -> list[int]:
        """Number of tiles of each image of one sample."""

    @abstractmethod
    def places(self, sizes: Sequence[Size], image_processor: Any) -> list[Places]:
        """Positions of the visual tokens in each image of one sample, for images that ``image_processor`` prepares."""

    @abstractmethod
    def examples(self) -> list[Size]:
        """Image sizes that cover the range of lengths, for reports."""


class ImageLayout(ImageGeometry):
    """What the training loop needs in addition to the geometry.

    A family with videos is a dataclass with the field ``video: VideoSettings | None = None`` and implements
    :meth:`video_tokens`, :meth:`video_pixels` and :meth:`placeholder`.
    """

    stacks_videos: ClassVar[bool] = True
    """Whether the model takes the frames of all videos as one tensor, so that all need the same number of frames."""
    video: Any = None

    def with_videos(self, settings: Any) -> ImageLayout:
        """A copy of this layout that also supports videos.

        Args:
            settings: a :class:`~vtprune_train.models.families.videos.VideoSettings`.
        """
        return dataclasses.replace(self, video=settings)  # type: ignore[type-var]

    def clip(self, header: VideoHeader, start: float | None = None, end: float | None = None) -> Clip:
        """Sample the frames of a video, or of its part from ``start`` to ``end`` in seconds.

        Raises:
            ValueError: the part has no frame, or the family's processor refuses the size.
        """
        assert self.video is not None, "the layout was built without videos"
        clip: Clip = self.video.sampling.clip(header, start, end)
        return clip

    def visual_tokens(self, visuals: Sequence[Visual]) -> list[VisualTokens]:
        """The visual tokens of each image and video of one sample.

        Raises:
            ValueError: the family's processor refuses a size.
        """
        sizes = [visual for visual in visuals if not isinstance(visual, Clip)]
        known = (self.tokens, self.tiles, self.grids, self.tile_tokens)
        images = zip(*(of(sizes) for of in known), strict=True) if sizes else iter(())
        tokens_of: list[VisualTokens] = []
        for visual in visuals:
            if isinstance(visual, Clip):
                tokens_of.append(self.video_tokens(visual))
            else:
                tokens, tiles, grids, tile_tokens = next(images)
                tokens_of.append(VisualTokens((tokens,), tiles, 0, grids, tile_tokens))
        return tokens_of

    def visual_pixels(
        self, image_processor: Any, visuals: Sequence[Visual], content: Sequence[Image.Image | np.ndarray]
    ) -> list[Tensor]:
        """The vision tower's input for each image and video of one sample, [tiles, ...] float32.

        Args:
            image_processor: transformers' image processor.
            visuals: their sizes.
            content: each image, and the frames of each video [T, height, width, 3] uint8.
        """
        images: list[Any] = [image for visual, image in zip(visuals, content, strict=True) if type(visual) is tuple]
        prepared = iter(self.pixels(image_processor, images) if images else ())
        return [
            self.video_pixels(visual, np.asarray(frames)) if isinstance(visual, Clip) else next(prepared)
            for visual, frames in zip(visuals, content, strict=True)
        ]

    def video_tokens(self, clip: Clip) -> VisualTokens:
        """The visual tokens of a video."""
        raise ValueError(f"{type(self).__name__} does not take videos")

    def video_pixels(self, clip: Clip, frames: np.ndarray) -> Tensor:
        """The vision tower's input for a video, [tiles, ...] float32, from its frames [T, height, width, 3] uint8, or
        from its frames after :meth:`resized`."""
        raise ValueError(f"{type(self).__name__} does not take videos")

    def frame_size(self, clip: Clip) -> Size:
        """The size that :meth:`video_pixels` resizes frames to, before any crop."""
        raise ValueError(f"{type(self).__name__} does not take videos")

    def resized(self, clip: Clip, frame: np.ndarray) -> np.ndarray:
        """A frame, resized as :meth:`video_pixels` does, [height, width, 3] uint8. Resizing the frames of a long video
        while it is decoded needs less memory and gives the same pixels."""
        assert self.video is not None, "the layout was built without videos"
        resized: np.ndarray = self.video.resize(frame[None], self.frame_size(clip))[0].permute(1, 2, 0).numpy()
        return resized

    def frame_places(self, clip: Clip) -> Places:
        """Positions of the visual tokens of one step in time in its frame."""
        rows, columns = self.video_tokens(clip).grids[0]
        return grid_places(*clip.size, rows, columns)

    def placeholder(self, visual: Visual) -> str | None:
        """The text that the family writes for an image or video, with ``<image>`` or ``<video>`` for each run of its
        tokens; ``None`` for the placeholder of the family's images."""
        return None

    def texts(self, visuals: Sequence[Visual], image: str) -> list[str]:
        """The text of each image and video; ``image`` is the placeholder of the family's images."""
        return [image if (text := self.placeholder(visual)) is None else text for visual in visuals]

    def grids(self, sizes: Sequence[Size]) -> list[Grids]:
        """The grids of each image's tokens, in their order, for the images of one sample."""
        return [() for _ in sizes]

    def tile_tokens(self, sizes: Sequence[Size]) -> list[tuple[int, ...]]:
        """The number of tokens of each tile, for the images of one sample; see
        :class:`~vtprune_train.core.stream.ImageSpan`."""
        return [() for _ in sizes]

    @abstractmethod
    def pixels(self, image_processor: Any, images: Sequence[Image.Image]) -> list[Tensor]:
        """The vision tower's input for each image of one sample, [tiles, ...] float32."""

    @abstractmethod
    def vision_inputs(self, samples: Sequence[SampleImages]) -> VisionInputs:
        """Pack the images of all samples. Without images, pack a blank one, so that every rank runs the tower."""

    @abstractmethod
    def model_inputs(self, images: SampleImages) -> dict[str, Tensor]:
        """The images of one sample as keywords of the model's own ``forward``."""

    def positions(self, segments: Sequence[SegmentLayout], samples: Sequence[SampleImages]) -> Tensor | None:
        """[parts, T] int64 positions that stay with their tokens; ``None`` if positions are token indices."""
        return None


class GatheredTiles(ImageLayout):
    """A layout of tiles of one size, whose projected features are gathered by an index that implements un-padding and
    newlines."""

    tile_size: int
    patch_size: int

    @property
    def patches_per_side(self) -> int:
        return self.tile_size // self.patch_size

    @property
    def patches_per_tile(self) -> int:
        return self.patches_per_side**2

    def tile_edges(self, tiles: int) -> np.ndarray:
        """[features + 1] edges of the features of ``tiles`` adjacent tiles, in pixels. Pixels after the last whole
        patch of a tile count as part of that patch, except in the last tile, where no token represents them."""
        starts = np.arange(tiles)[:, None] * self.tile_size + np.arange(self.patches_per_side) * self.patch_size
        return np.append(starts, starts[-1, -1] + self.patch_size)

    @abstractmethod
    def num_tiles(self, image_size: Size) -> int:
        """Number of tiles of an image."""

    @abstractmethod
    def visual_index(self, image_size: Size) -> np.ndarray:
        """[V] int64: for each visual token, the row of the image's ``num_tiles * patches_per_tile`` features, or
        ``NEWLINE``."""

    def tokens(self, sizes: Sequence[Size]) -> list[int]:
        return [len(self.visual_index(size)) for size in sizes]

    def tiles(self, sizes: Sequence[Size]) -> list[int]:
        return [self.num_tiles(size) for size in sizes]

    def tile_tokens(self, sizes: Sequence[Size]) -> list[tuple[int, ...]]:
        every = [(self.visual_index(size), self.num_tiles(size)) for size in sizes]
        return [tokens_per_tile(patches, self.patches_per_tile) for patches in every]

    def pixels(self, image_processor: Any, images: Sequence[Image.Image]) -> list[Tensor]:
        every = [image_processor(images=image, return_tensors="pt")["pixel_values"][0] for image in images]
        return [pixels.reshape(-1, *pixels.shape[-3:]) for pixels in every]

    def vision_inputs(self, samples: Sequence[SampleImages]) -> VisionInputs:
        index, tiles = [np.zeros(0, dtype=np.int64)], 0
        samples = [sample.select(tuple) for sample in samples]
        for sample in samples:
            for size, pixels in zip(sample.sizes, sample.pixels, strict=True):
                rows = self.visual_index(size)
                index.append(np.where(rows == NEWLINE, NEWLINE, rows + tiles * self.patches_per_tile))
                tiles += len(pixels)
        flat = np.concatenate(index)
        newline = max(tiles, 1) * self.patches_per_tile  # appended after all features
        blank = torch.zeros(1, 3, self.tile_size, self.tile_size)
        every = [pixels for sample in samples for pixels in sample.pixels]
        return VisionInputs(
            pixel_values=torch.cat(every) if every else blank,
            visual_index=torch.from_numpy(np.where(flat == NEWLINE, newline, flat)),
        )


def tokens_per_tile(patches: TokenPatches, patches_per_tile: int) -> tuple[int, ...]:
    """The number of an image's tokens in each of its tiles, without newlines."""
    index, tiles = patches
    return tuple(np.bincount(index[index != NEWLINE] // patches_per_tile, minlength=tiles).tolist())


def check_aspect(size: Size, what: str = "an image") -> None:
    """Reject an image, or a video by the size of its frames, with an extreme aspect ratio, which image processors would
    enlarge excessively or reject.

    Raises:
        ValueError: it is more than :data:`MAX_ASPECT` times as long as wide; the message names its size.
    """
    if max(size) > MAX_ASPECT * min(size):
        raise ValueError(
            f"{what} of {size[0]} x {size[1]} pixels is more than {MAX_ASPECT} times as long as wide; "
            "this family's image processor cannot take it"
        )
