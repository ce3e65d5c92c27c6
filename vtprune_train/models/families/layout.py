"""Image layouts: how a family divides images into tiles and visual tokens, and how the collator packs them. Host only.

Shape suffixes: T tokens in the packed batch, V visual tokens, P tiles (or patches, where a family has no tiles).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vtprune_train.core.stream import SegmentLayout
from vtprune_train.models.families.places import Places

if TYPE_CHECKING:  # pruning a model does not need Pillow
    from PIL import Image

NEWLINE = -1
MAX_ASPECT = 200  # Qwen's limit; CLIP's processor would scale the SHORT side to a whole tile

Size = tuple[int, int]
"""``(height, width)`` of an image in pixels."""
Grids = tuple[tuple[int, int], ...]
"""See :class:`~vtprune_train.core.stream.ImageSpan`."""
TokenPatches = tuple[np.ndarray, int]
"""The patch of its image that each visual token represents ([V] int64, or ``NEWLINE``), and the image's number of
tiles."""


@dataclass(frozen=True)
class VideoHeader:
    """What a video's file says about it: the size of its frames in pixels (after rotation), the number of frames, the
    mean frames per second, and the duration in seconds."""

    height: int
    width: int
    frames: int
    fps: float
    duration: float


@dataclass
class SampleImages:
    """The images of one sample: their sizes, and the vision tower's input for each ([tiles, ...] float32)."""

    sizes: list[Size]
    pixels: list[Tensor]


class VisionInputs(NamedTuple):
    """The fields of a :class:`~vtprune_train.core.stream.PackedBatch` that describe images."""

    pixel_values: Tensor
    visual_index: Tensor
    image_inputs: dict[str, Any] | None = None


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
    """What the training loop needs in addition to the geometry."""

    def grids(self, sizes: Sequence[Size]) -> list[Grids]:
        """The grids of each image's tokens, in their order, for the images of one sample."""
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

    def pixels(self, image_processor: Any, images: Sequence[Image.Image]) -> list[Tensor]:
        every = [image_processor(images=image, return_tensors="pt")["pixel_values"][0] for image in images]
        return [pixels.reshape(-1, *pixels.shape[-3:]) for pixels in every]

    def vision_inputs(self, samples: Sequence[SampleImages]) -> VisionInputs:
        index, tiles = [np.zeros(0, dtype=np.int64)], 0
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


def check_aspect(size: Size) -> None:
    """Refuse an image with an extreme aspect ratio, which image processors would enlarge excessively or refuse.

    Raises:
        ValueError: the image is more than :data:`MAX_ASPECT` times as long as wide; the message names its size.
    """
    if max(size) > MAX_ASPECT * min(size):
        raise ValueError(
            f"an image of {size[0]} x {size[1]} pixels is more than {MAX_ASPECT} times as long as wide; "
            "this family's image processor cannot take it"
        )
