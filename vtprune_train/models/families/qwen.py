"""What Qwen2-VL, Qwen2.5-VL and Qwen3-VL share: an image of any size, cut into patches that are merged by fours;
positions of (time, height, width).

The features come from the family's own ``get_image_features``. What it would read from sizes on the device (windows,
rotary positions, sequence bounds) is computed here by transformers' own functions and handed to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from vtprune_train.core.flops import PatchTowerGeometry
from vtprune_train.core.stream import SegmentLayout
from vtprune_train.models import HFModule
from vtprune_train.models.families.layout import Grids, ImageLayout, Pictures, Size, VisionInputs, check_aspect
from vtprune_train.models.families.places import Places, grid_places
from vtprune_train.models.families.qwen_tower import PatchGrids, TowerShape, tower_inputs

EXAMPLES = ((224, 224), (448, 448), (768, 1024), (1080, 1920), (2160, 3840))
CHANNELS = 3


@dataclass(frozen=True)
class MergedPatches(ImageLayout):
    """Patches of ``patch_size`` pixels, ``merge_size`` x ``merge_size`` of them one token, in pictures of
    ``min_pixels`` to ``max_pixels``; ``window_size`` pixels a side of an attention window, ``None`` without windows."""

    unit: ClassVar[str] = "patches"

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    window_size: int | None
    min_pixels: int
    max_pixels: int

    @classmethod
    def of(cls, config: Any, image_processor: Any) -> MergedPatches:
        """Read a model's config and the checkpoint's image processor.

        Raises:
            ValueError: the two disagree about patches.
        """
        vision = config.vision_config
        for ours, theirs in (
            ("patch_size", "patch_size"),
            ("merge_size", "spatial_merge_size"),
            ("temporal_patch_size", "temporal_patch_size"),
        ):
            if getattr(image_processor, ours) != getattr(vision, theirs):
                raise ValueError(
                    f"the image processor's {ours}={getattr(image_processor, ours)} is not the model's "
                    f"vision_config.{theirs}={getattr(vision, theirs)}; they belong to different checkpoints"
                )
        size = image_processor.size
        return cls(
            vision.patch_size,
            vision.spatial_merge_size,
            vision.temporal_patch_size,
            getattr(vision, "window_size", None),
            size["shortest_edge"],
            size["longest_edge"],
        )

    def grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns of patches."""
        check_aspect(size)
        height, width = smart_resize(
            *size, self.patch_size * self.merge_size, min_pixels=self.min_pixels, max_pixels=self.max_pixels
        )
        return height // self.patch_size, width // self.patch_size

    def tiles(self, sizes: Sequence[Size]) -> list[int]:
        """Patches, before merging."""
        return [rows * columns for rows, columns in map(self.grid, sizes)]

    def tokens(self, sizes: Sequence[Size]) -> list[int]:
        return [patches // self.merge_size**2 for patches in self.tiles(sizes)]

    def grids(self, sizes: Sequence[Size]) -> list[Grids]:
        return [((rows // self.merge_size, columns // self.merge_size),) for rows, columns in map(self.grid, sizes)]

    def pixels(self, image_processor: Any, images: Sequence[Image.Image]) -> list[Tensor]:
        """[patches, channels * frames * patch * patch] of each picture."""
        return [image_processor(images=image, return_tensors="pt")["pixel_values"] for image in images]

    def vision_inputs(self, samples: Sequence[Pictures]) -> VisionInputs:
        grids = [(1, *self.grid(size)) for sample in samples for size in sample.sizes]
        every = [pixels for sample in samples for pixels in sample.pixels]
        tokens = sum(len(pixels) for pixels in every) // self.merge_size**2
        if not grids:
            grids = [(1, self.merge_size, self.merge_size)]
            per_patch = CHANNELS * self.temporal_patch_size * self.patch_size**2
            every = [torch.zeros(self.merge_size**2, per_patch)]
        return VisionInputs(torch.cat(every), torch.arange(tokens), self._image_inputs(tuple(grids)))

    def _image_inputs(self, grids: PatchGrids) -> dict[str, Any]:
        made = tower_inputs(TowerShape(self.merge_size, self.patch_size, self.window_size), grids)
        return {"image_grid_thw": grids, **{f"image_{key}": value for key, value in made.items()}}

    def model_inputs(self, pictures: Pictures) -> dict[str, Tensor]:
        grids = torch.tensor([(1, *self.grid(size)) for size in pictures.sizes])
        return {"pixel_values": torch.cat(pictures.pixels), "image_grid_thw": grids}

    def places(self, sizes: Sequence[Size], image_processor: Any) -> list[Places]:
        """The whole image is squeezed to a multiple of a merged patch."""
        return [grid_places(*size, *grid[0]) for size, grid in zip(sizes, self.grids(sizes), strict=True)]

    def examples(self) -> list[Size]:
        return list(EXAMPLES)

    def positions(self, segments: Sequence[SegmentLayout], samples: Sequence[Pictures]) -> Tensor:
        """[3, T]: text counts on; a picture's tokens count its rows and columns from there, and what follows it goes
        on after the larger of the two (``get_rope_index`` of transformers)."""
        parts = []
        for number, segment in enumerate(segments):
            sizes = samples[number].sizes if number < len(samples) else []
            offset = position = 0
            for span, size in zip(segment.spans, sizes, strict=True):
                rows, columns = (side // self.merge_size for side in self.grid(size))
                parts.append(_text(position, span.start - offset))
                position += span.start - offset
                parts.append(position + np.indices((1, rows, columns)).reshape(3, -1))
                position += max(rows, columns)
                offset = span.end
            parts.append(_text(position, segment.length - offset))
        return torch.from_numpy(np.ascontiguousarray(np.concatenate(parts, axis=1)))


def _text(position: int, length: int) -> np.ndarray:
    return np.broadcast_to(np.arange(position, position + length), (3, length))


def merged_grids(config: Any, inputs: Mapping[str, Any]) -> list[Grids]:
    """One raster an image, of tokens that are patches merged."""
    merge = config.vision_config.spatial_merge_size
    return [((rows // merge, columns // merge),) for _, rows, columns in inputs["image_grid_thw"].tolist()]


def rope_index(base: HFModule, inputs: dict[str, Any]) -> Tensor:
    """[3, B, L] positions, from ``input_ids``, ``image_grid_thw`` and the mask of these tokens."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    return base.get_rope_index(
        input_ids=ids,
        mm_token_type_ids=(ids == base.config.image_token_id).int(),
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=None if mask is None else mask[:, mask.shape[1] - ids.shape[1] :],
    )[0]


def patch_tower(config: Any, width: int, intermediate: int, out: int, **more: Any) -> PatchTowerGeometry:
    """Sizes of a tower and its merger. Without more it attends over whole images and its MLP has two products.

    Args:
        config: the model's.
        width: of the tower.
        intermediate: of its MLP.
        out: of the merger's result.
        more: see :class:`~vtprune_train.core.flops.PatchTowerGeometry`.
    """
    vision = config.vision_config
    sizes = {
        "num_layers": vision.depth,
        "full_layers": vision.depth,
        "hidden": width,
        "intermediate": intermediate,
        "patch_values": vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        "window": 0,
        "merge": vision.spatial_merge_size**2,
        "projector_out": out,
        "mlp_products": 2,
    }
    return PatchTowerGeometry(**{**sizes, **more})
