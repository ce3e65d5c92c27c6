"""How a family lays out images: what commands ask of their sizes, and what the collator asks beyond that. Host only.

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
MAX_ASPECT = 200  # Qwen's own limit; a CLIP processor scales the SHORT side to a whole tile

Size = tuple[int, int]
"""``(height, width)`` of an image in pixels."""
Grids = tuple[tuple[int, int], ...]
"""See :class:`~vtprune_train.core.stream.ImageSpan`."""
Shown = tuple[np.ndarray, int]
"""The patch of its image that each visual token shows ([V] int64, or ``NEWLINE``), and the image's tiles."""


@dataclass
class Pictures:
    """The images of one sample: their sizes, and what the tower sees of each ([tiles, ...] float32)."""

    sizes: list[Size]
    pixels: list[Tensor]


class VisionInputs(NamedTuple):
    """The vision side of a :class:`~vtprune_train.core.stream.PackedBatch`, whose fields these are."""

    pixel_values: Tensor
    visual_index: Tensor
    image_inputs: dict[str, Any] | None = None


class ImageGeometry(ABC):
    """How a family divides images into tiles and tokens. Families without tiles count patches instead."""

    unit: ClassVar[str] = "tiles"

    @abstractmethod
    def tokens(self, sizes: Sequence[Size]) -> list[int]:
        """Visual tokens of each image of one sample.

        Raises:
            ValueError: a size that the family's image processor refuses.
        """

    @abstractmethod
    def tiles(self, sizes: Sequence[Size]) -> list[int]:
        """Tiles of each image of one sample."""

    @abstractmethod
    def places(self, sizes: Sequence[Size], image_processor: Any) -> list[Places]:
        """Where the visual tokens of each image of one sample lie, for images that ``image_processor`` prepares."""

    @abstractmethod
    def examples(self) -> list[Size]:
        """Sizes that show the range of lengths."""


class ImageLayout(ImageGeometry):
    """What the training loop needs beyond the geometry."""

    def grids(self, sizes: Sequence[Size]) -> list[Grids]:
        """The rasters that each image's tokens fill, in their order, for the images of one sample."""
        return [() for _ in sizes]

    @abstractmethod
    def pixels(self, image_processor: Any, images: Sequence[Image.Image]) -> list[Tensor]:
        """What the tower sees of each image of one sample, [tiles, ...] float32."""

    @abstractmethod
    def vision_inputs(self, samples: Sequence[Pictures]) -> VisionInputs:
        """Pack the images of all samples; a blank one where there are none, so that every rank runs the tower."""

    @abstractmethod
    def model_inputs(self, pictures: Pictures) -> dict[str, Tensor]:
        """The images of one sample as the model's own ``forward`` takes them."""

    def positions(self, segments: Sequence[SegmentLayout], samples: Sequence[Pictures]) -> Tensor | None:
        """[parts, T] int64 positions that stay with their tokens; ``None`` where each segment counts its tokens."""
        return None


class GatheredTiles(ImageLayout):
    """Tiles of one size, whose projected features are gathered into place: un-padding and newlines are in the index."""

    tile_size: int
    patch_size: int

    @property
    def patches_per_side(self) -> int:
        return self.tile_size // self.patch_size

    @property
    def patches_per_tile(self) -> int:
        return self.patches_per_side**2

    def tile_edges(self, tiles: int) -> np.ndarray:
        """[features + 1] edges of the features of ``tiles`` tiles side by side, in pixels. Pixels that a tile has
        beyond its last whole patch count for that patch, but for those of the last tile, which no token sees."""
        starts = np.arange(tiles)[:, None] * self.tile_size + np.arange(self.patches_per_side) * self.patch_size
        return np.append(starts, starts[-1, -1] + self.patch_size)

    @abstractmethod
    def num_tiles(self, image_size: Size) -> int:
        """Tiles that the tower sees."""

    @abstractmethod
    def visual_index(self, image_size: Size) -> np.ndarray:
        """[V] int64: for each visual token, its row in the image's ``num_tiles * patches_per_tile`` features, or
        ``NEWLINE``."""

    def tokens(self, sizes: Sequence[Size]) -> list[int]:
        return [len(self.visual_index(size)) for size in sizes]

    def tiles(self, sizes: Sequence[Size]) -> list[int]:
        return [self.num_tiles(size) for size in sizes]

    def pixels(self, image_processor: Any, images: Sequence[Image.Image]) -> list[Tensor]:
        made = [image_processor(images=image, return_tensors="pt")["pixel_values"][0] for image in images]
        return [pixels.reshape(-1, *pixels.shape[-3:]) for pixels in made]

    def vision_inputs(self, samples: Sequence[Pictures]) -> VisionInputs:
        index, tiles = [np.zeros(0, dtype=np.int64)], 0
        for sample in samples:
            for size, pixels in zip(sample.sizes, sample.pixels, strict=True):
                own = self.visual_index(size)
                index.append(np.where(own == NEWLINE, NEWLINE, own + tiles * self.patches_per_tile))
                tiles += len(pixels)
        flat = np.concatenate(index)
        newline = max(tiles, 1) * self.patches_per_tile  # stands after all features
        blank = torch.zeros(1, 3, self.tile_size, self.tile_size)
        every = [pixels for sample in samples for pixels in sample.pixels]
        return VisionInputs(
            pixel_values=torch.cat(every) if every else blank,
            visual_index=torch.from_numpy(np.where(flat == NEWLINE, newline, flat)),
        )


def check_aspect(size: Size) -> None:
    """Refuse an image so long that an image processor would blow it up, or refuses it itself.

    Raises:
        ValueError: with the image's size.
    """
    if max(size) > MAX_ASPECT * min(size):
        raise ValueError(
            f"an image of {size[0]} x {size[1]} pixels is more than {MAX_ASPECT} times as long as wide; "
            "this family's image processor cannot take it"
        )
