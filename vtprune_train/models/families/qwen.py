"""Shared by Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size, split into patches that are merged 2 x 2, and (time,
height, width) positions.

The features come from the model's own ``get_image_features``. The vision tower processes the patches of all images as
one sequence and splits attention by ``cu_seqlens``: one segment per frame, or per window in the windowed layers of
Qwen2.5-VL. The inputs that it would derive from sizes on the device (windows, rotary positions, sequence bounds) are
computed here on the host by transformers' functions and passed to it.

Shape suffixes: N patches of all images, M merged patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from vtprune_train.core.flops import PatchTowerGeometry
from vtprune_train.core.stream import IMAGE, SegmentLayout
from vtprune_train.models import HFModule
from vtprune_train.models.families.base import Loop
from vtprune_train.models.families.layout import Grids, ImageLayout, SampleImages, Size, VisionInputs, check_aspect
from vtprune_train.models.families.places import Places, grid_places
from vtprune_train.models.families.towers import SavedByTower

if TYPE_CHECKING:  # pruning a model does not need Pillow
    from PIL import Image

EXAMPLES = ((224, 224), (448, 448), (768, 1024), (1080, 1920), (2160, 3840))
CHANNELS = 3
PatchGrids = tuple[tuple[int, int, int], ...]
"""``(frames, rows, columns)`` of each image's patches."""


@dataclass(frozen=True)
class MergedPatches(ImageLayout):
    """Layout with one token per ``merge_size`` x ``merge_size`` patches of ``patch_size`` pixels, for images resized to
    ``min_pixels`` to ``max_pixels``; ``tower`` has the sizes of the vision tower."""

    unit: ClassVar[str] = "patches"

    tower: TowerShape
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int

    @classmethod
    def of(cls, config: Any, image_processor: Any) -> MergedPatches:
        """The layout for a model's config and the checkpoint's image processor.

        Raises:
            ValueError: their patch sizes differ.
        """
        vision = config.vision_config
        for key, vision_key in (
            ("patch_size", "patch_size"),
            ("merge_size", "spatial_merge_size"),
            ("temporal_patch_size", "temporal_patch_size"),
        ):
            if getattr(image_processor, key) != getattr(vision, vision_key):
                raise ValueError(
                    f"the image processor's {key}={getattr(image_processor, key)} is not the model's "
                    f"vision_config.{vision_key}={getattr(vision, vision_key)}; they belong to different checkpoints"
                )
        size = image_processor.size
        return cls(
            TowerShape.of_config(vision), vision.temporal_patch_size, size["shortest_edge"], size["longest_edge"]
        )

    @property
    def patch_size(self) -> int:
        return self.tower.patch_size

    @property
    def merge_size(self) -> int:
        return self.tower.merge_size

    def grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns of patches."""
        check_aspect(size)
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize  # needs Pillow

        height, width = smart_resize(
            *size, self.patch_size * self.merge_size, min_pixels=self.min_pixels, max_pixels=self.max_pixels
        )
        return height // self.patch_size, width // self.patch_size

    def tiles(self, sizes: Sequence[Size]) -> list[int]:
        """Number of patches of each image, before merging."""
        return [rows * columns for rows, columns in map(self.grid, sizes)]

    def tokens(self, sizes: Sequence[Size]) -> list[int]:
        return [patches // self.merge_size**2 for patches in self.tiles(sizes)]

    def grids(self, sizes: Sequence[Size]) -> list[Grids]:
        return [((rows // self.merge_size, columns // self.merge_size),) for rows, columns in map(self.grid, sizes)]

    def pixels(self, image_processor: Any, images: Sequence[Image.Image]) -> list[Tensor]:
        """[patches, channels * frames * patch * patch] of each image."""
        return [image_processor(images=image, return_tensors="pt")["pixel_values"] for image in images]

    def vision_inputs(self, samples: Sequence[SampleImages]) -> VisionInputs:
        grids = [(1, *self.grid(size)) for sample in samples for size in sample.sizes]
        every = [pixels for sample in samples for pixels in sample.pixels]
        tokens = sum(len(pixels) for pixels in every) // self.merge_size**2
        if not grids:
            grids = [(1, self.merge_size, self.merge_size)]
            per_patch = CHANNELS * self.temporal_patch_size * self.patch_size**2
            every = [torch.zeros(self.merge_size**2, per_patch)]
        inputs = tower_inputs(self.tower, tuple(grids))
        image_inputs = {"image_grid_thw": tuple(grids), **{f"image_{key}": value for key, value in inputs.items()}}
        return VisionInputs(torch.cat(every), torch.arange(tokens), image_inputs)

    def model_inputs(self, images: SampleImages) -> dict[str, Tensor]:
        grids = torch.tensor([(1, *self.grid(size)) for size in images.sizes])
        return {"pixel_values": torch.cat(images.pixels), "image_grid_thw": grids}

    def places(self, sizes: Sequence[Size], image_processor: Any) -> list[Places]:
        """Positions of tokens; the image is resized to a multiple of a merged patch."""
        return [grid_places(*size, *grid[0]) for size, grid in zip(sizes, self.grids(sizes), strict=True)]

    def examples(self) -> list[Size]:
        return list(EXAMPLES)

    def positions(self, segments: Sequence[SegmentLayout], samples: Sequence[SampleImages]) -> Tensor:
        """[3, T] positions as in transformers' ``get_rope_index``: text tokens count up; the tokens of an image count
        its rows and columns from the current position, and the text after it continues after the larger of the two."""
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
    """One grid of merged patches per image."""
    merge = config.vision_config.spatial_merge_size
    return [((rows // merge, columns // merge),) for _, rows, columns in inputs["image_grid_thw"].tolist()]


def rope_index(base: HFModule, inputs: dict[str, Any]) -> Tensor:
    """[3, B, L] positions from ``input_ids``, ``image_grid_thw`` and ``attention_mask``."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    return base.get_rope_index(
        input_ids=ids,
        mm_token_type_ids=(ids == base.config.image_token_id).int(),
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=None if mask is None else mask[:, mask.shape[1] - ids.shape[1] :],
    )[0]


def patch_tower(config: Any, width: int, intermediate: int, out: int, **more: Any) -> PatchTowerGeometry:
    """Sizes of a tower of ``width`` with an MLP of ``intermediate``, and a merger with output ``out``. ``more`` are
    fields of :class:`~vtprune_train.core.flops.PatchTowerGeometry`; by default attention spans whole images and the MLP
    has two matrix products."""
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


def image_processor(config: Any, **more: Any) -> Qwen2VLImageProcessorPil:
    """The image processor for a model's patch sizes; ``more`` are its other settings."""
    vision = config.vision_config
    return Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        **more,
    )


def patch_loop(saved: Callable[[Any], SavedByTower], **more: Any) -> Loop:
    """The :class:`Loop` of these families; ``more`` replaces its fields."""
    fields = {
        "layout": MergedPatches.of,
        "image_processor": image_processor,
        "image_processors": ("Qwen2VLImageProcessor",),
        "saved": saved,
        "vision": "model.visual.",
        "projector": ("model.visual.merger.",),
        "image_token": "<|image_pad|>",
        "placeholder": f"<|vision_start|>{IMAGE}<|vision_end|>",
        "needs_checkpoint": True,
    }
    return Loop(**{**fields, **more})


def saved_by_patches(config: Any, width: int, intermediate: int, per_mlp: int, mergers: int = 1) -> SavedByTower:
    """Activations of a tower of ``width`` with LayerNorms and an MLP of two matrices, which saves ``per_mlp`` values
    for each of its ``intermediate``; attention values keep the whole output of the fused projection alive."""
    vision = config.vision_config
    return SavedByTower(
        layers=vision.depth,
        tokens=1,
        hidden=width,
        intermediate=intermediate,
        elements=11 * width + per_mlp * intermediate,
        raw_bytes=16 + 4 * vision.num_heads,
        projector=mergers * (4 * width + config.text_config.hidden_size // vision.spatial_merge_size**2),
    )


@dataclass(frozen=True)
class PositionTable:
    """A learned table of positions, ``side`` x ``side``, interpolated to the grid of each image (Qwen3-VL)."""

    side: int
    mode: str
    align_corners: bool


@dataclass(frozen=True)
class TowerShape:
    """Sizes of a vision tower: ``merge_size`` x ``merge_size`` patches of ``patch_size`` pixels are merged; attention
    windows have ``window_size`` pixels per side, ``None`` without them; ``table`` has learned positions, or is
    ``None``."""

    merge_size: int
    patch_size: int
    window_size: int | None = None
    table: PositionTable | None = None

    @classmethod
    def of(cls, tower: Any) -> TowerShape:
        """The sizes of a vision tower of Qwen2-VL, Qwen2.5-VL or Qwen3-VL."""
        table = None
        if hasattr(tower, "num_grid_per_side"):
            table = PositionTable(tower.num_grid_per_side, tower.interpolation_mode, tower.interpolation_align_corners)
        window = getattr(tower, "window_size", None)
        return cls(tower.spatial_merge_size, tower.config.patch_size, window, table)

    @classmethod
    def of_config(cls, vision: Any) -> TowerShape:
        """The sizes of the tower that transformers builds from a vision config."""
        table = None
        if hasattr(vision, "num_position_embeddings"):
            table = PositionTable(int(vision.num_position_embeddings**0.5), "bilinear", align_corners=True)
        window = getattr(vision, "window_size", None)
        return cls(vision.spatial_merge_size, vision.patch_size, window, table)

    @property
    def keywords(self) -> set[str]:
        """The keywords that :func:`tower_inputs` returns."""
        names = {"position_ids", "cu_seqlens", "max_seqlen"}
        if self.window_size is not None:
            names |= {"window_index", "cu_window_seqlens", "max_window_seqlen"}
        if self.table is not None:
            names |= {"interp_indices", "interp_weights"}
        return names


def tower_inputs(shape: TowerShape, grids: PatchGrids) -> dict[str, Tensor | int]:
    """Keywords of the tower's ``forward``, computed by transformers' functions on the CPU.

    Returns:
        ``position_ids`` [N, 2] int64, ``cu_seqlens`` [frames + 1] int32, ``max_seqlen``; with windows ``window_index``
        [M] int64, ``cu_window_seqlens`` [windows + 1] int32, ``max_window_seqlen``; with a table ``interp_indices``
        [N, taps] int64, ``interp_weights`` [N, taps] float32.
    """
    grid_thw = torch.tensor(grids)
    cu_seqlens = get_vision_cu_seqlens(grid_thw)
    inputs: dict[str, Tensor | int] = {
        "position_ids": get_vision_position_ids(grid_thw, shape.merge_size),
        "cu_seqlens": cu_seqlens,
        "max_seqlen": int(cu_seqlens.diff().max()),
    }
    if shape.window_size is not None:
        window_index, cu_windows = get_vision_window_index(
            grid_thw, shape.merge_size, shape.window_size, shape.patch_size
        )
        inputs |= {
            "window_index": window_index,
            "cu_window_seqlens": cu_windows,
            "max_window_seqlen": int(cu_windows.diff().max()),
        }
    if shape.table is not None:
        inputs["interp_indices"], inputs["interp_weights"] = get_vision_interpolation_indices_and_weights(
            grid_thw,
            num_grid_per_side=shape.table.side,
            mode=shape.table.mode,
            align_corners=shape.table.align_corners,
            spatial_merge_size=shape.merge_size,
        )
    return inputs


def frame_lengths(grids: PatchGrids) -> tuple[int, ...]:
    """Number of patches of each frame of each image: the attention segments of a layer without windows."""
    return tuple(rows * columns for frames, rows, columns in grids for _ in range(frames))


def window_lengths(shape: TowerShape, grids: PatchGrids) -> tuple[int, ...]:
    """Number of patches of each window, in the order of ``window_index``; windows at the edges of an image are
    smaller."""
    assert shape.window_size is not None
    side = shape.window_size // shape.patch_size // shape.merge_size * shape.merge_size
    lengths: list[int] = []
    for frames, rows, columns in grids:
        per_frame = np.outer(_pieces(rows, side), _pieces(columns, side)).ravel().tolist()
        lengths += per_frame * frames
    return tuple(lengths)


def _pieces(length: int, size: int) -> list[int]:
    """Divide ``length`` into pieces of ``size``; the last one may be smaller."""
    return [min(size, length - start) for start in range(0, length, size)]
