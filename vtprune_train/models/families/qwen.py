"""Shared by Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size, split into patches that are merged 2 x 2, and (time,
height, width) positions.

The features come from the model's own ``get_image_features``. The vision tower processes the patches of all images as
one sequence and splits attention by ``cu_seqlens``: one segment per frame, or per window in the windowed layers of
Qwen2.5-VL. The inputs that it would derive from sizes on the device (windows, rotary positions, sequence bounds) are
computed here on the host by transformers' functions and passed to it.

Shape suffixes: N patches of all images, M merged patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from vtprune_train.core.flops import PatchTowerGeometry
from vtprune_train.core.stream import IMAGE, VIDEO, SegmentLayout
from vtprune_train.models import HFModule
from vtprune_train.models.families.base import Loop
from vtprune_train.models.families.layout import (
    Clip,
    Grids,
    ImageLayout,
    SampleImages,
    Size,
    VideoHeader,
    VisionInputs,
    Visual,
    VisualTokens,
    check_aspect,
)
from vtprune_train.models.families.places import Places, grid_places
from vtprune_train.models.families.towers import SavedByTower
from vtprune_train.models.families.videos import HALF, Sampling, VideoSettings, timestamps

if TYPE_CHECKING:  # pruning a model does not need Pillow
    from PIL import Image

EXAMPLES = ((224, 224), (448, 448), (768, 1024), (1080, 1920), (2160, 3840))
CHANNELS = 3
VISION = "<|vision_start|>{}<|vision_end|>"
# Defaults of transformers' video processors; 2 frames per second, as in the published code (qwen-vl-utils).
FRAMES_OF_ANY_SIZE = VideoSettings(
    Sampling("qwen2", 2.0, None, 4, 768, 2),
    (("longest_edge", 28 * 28 * 768), ("shortest_edge", 128 * 28 * 28)),
    max_video_tokens=128_000,
)
CLIPS_OF_ANY_SIZE = VideoSettings(
    Sampling("qwen3", 2.0, None, 4, 768, 2),
    (("longest_edge", 32 * 32 * 768), ("shortest_edge", 128 * 32 * 32)),
    mean=HALF,
    std=HALF,
    max_video_tokens=768,
)
PatchGrids = tuple[tuple[int, int, int], ...]
"""``(frames, rows, columns)`` of each image's patches."""


def truncates_seconds() -> bool:
    """Whether the installed transformers truncates the seconds of a step in time of Qwen2.5-VL's videos."""
    return tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 18)


@dataclass(frozen=True)
class MergedPatches(ImageLayout):
    """Layout with one token per ``merge_size`` x ``merge_size`` patches of ``patch_size`` pixels, for images resized to
    ``min_pixels`` to ``max_pixels``; ``tower`` has the sizes of the vision tower."""

    unit: ClassVar[str] = "patches"
    stacks_videos: ClassVar[bool] = False

    tower: TowerShape
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    tokens_per_second: float | None = None
    timestamps: bool = False
    video: VideoSettings | None = None

    @classmethod
    def of(cls, config: Any, image_processor: Any, timestamps: bool = False) -> MergedPatches:
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
            TowerShape.of_config(vision),
            vision.temporal_patch_size,
            size["shortest_edge"],
            size["longest_edge"],
            getattr(vision, "tokens_per_second", None),
            timestamps,
        )

    def patch_grid(self, visual: Visual) -> tuple[int, int, int]:
        """Steps in time, rows and columns of patches."""
        if not isinstance(visual, Clip):
            return 1, *self.grid(visual)
        height, width = self.frame_size(visual)
        steps = -(-len(visual.indices) // self.temporal_patch_size)
        return steps, height // self.patch_size, width // self.patch_size

    def frame_size(self, clip: Clip) -> Size:
        check_aspect(clip.size, "a video")
        assert self.video is not None, "the layout was built without videos"
        factor, edges = self.patch_size * self.merge_size, self.video.edges
        resize = resized_clip if self.timestamps else resized_frame
        return resize(clip, factor, self.temporal_patch_size, edges["shortest_edge"], edges["longest_edge"], self.video)

    def with_videos(self, settings: VideoSettings) -> ImageLayout:
        if self.tokens_per_second is not None and truncates_seconds():
            raise ValueError(
                f"videos of Qwen2.5-VL need transformers>=5.18: transformers {transformers.__version__} truncates the "
                "seconds between their steps in time to a whole number"
            )
        return super().with_videos(settings)

    def clip(self, header: VideoHeader, start: float | None = None, end: float | None = None) -> Clip:
        check_aspect((header.height, header.width), "a video")
        return super().clip(header, start, end)

    def video_tokens(self, clip: Clip) -> VisualTokens:
        steps, rows, columns = self.patch_grid(clip)
        grid = rows // self.merge_size, columns // self.merge_size
        per_step = grid[0] * grid[1]
        runs = (per_step,) * steps if self.timestamps else (steps * per_step,)
        return VisualTokens(runs, steps * rows * columns, steps, (grid,) * steps)

    def placeholder(self, visual: Visual) -> str | None:
        if not isinstance(visual, Clip):
            return None
        if not self.timestamps:
            return VISION.format(VIDEO)
        seconds = timestamps(visual, self.temporal_patch_size)
        return VISION.format("".join(f"<{second:.1f} seconds>{VISION.format(VIDEO)}" for second in seconds))

    def video_pixels(self, clip: Clip, frames: np.ndarray) -> Tensor:
        """[patches, channels * frames * patch * patch], step by step; the last frame is repeated to fill a step."""
        assert self.video is not None, "the layout was built without videos"
        pixels = self.video.prepare(frames, self.frame_size(clip))
        pixels = torch.cat([pixels, pixels[-1:].expand(-len(pixels) % self.temporal_patch_size, -1, -1, -1)])
        steps, rows, columns = self.patch_grid(clip)
        merge, patch = self.merge_size, self.patch_size
        blocks = pixels.view(
            steps, self.temporal_patch_size, CHANNELS, rows // merge, merge, patch, columns // merge, merge, patch
        )
        return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(steps * rows * columns, -1)

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
        grids = [self.patch_grid(visual) for sample in samples for visual in sample.sizes]
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
        inputs: dict[str, Tensor] = {}
        for kind, suffix, name in ((tuple, "", "image"), (Clip, "_videos", "video")):
            chosen = images.select(kind)
            if chosen.sizes:
                inputs[f"pixel_values{suffix}"] = torch.cat(chosen.pixels)
                inputs[f"{name}_grid_thw"] = torch.tensor([self.patch_grid(visual) for visual in chosen.sizes])
        if self.tokens_per_second is not None and "video_grid_thw" in inputs:
            inputs["second_per_grid_ts"] = torch.tensor([self._seconds(clip) for clip in images.select(Clip).sizes])
        return inputs

    def _seconds(self, clip: Clip) -> float:
        """Seconds of each step in time."""
        return self.temporal_patch_size / clip.sampled_fps

    def _times(self, clip: Clip, steps: int) -> np.ndarray:
        """[steps] int64 positions in time of a video without timestamps, from 0."""
        interval = 1.0 if self.tokens_per_second is None else self.tokens_per_second * self._seconds(clip)
        return (torch.arange(steps) * interval).long().numpy()

    def places(self, sizes: Sequence[Size], image_processor: Any) -> list[Places]:
        """Positions of tokens; the image is resized to a multiple of a merged patch."""
        return [grid_places(*size, *grid[0]) for size, grid in zip(sizes, self.grids(sizes), strict=True)]

    def examples(self) -> list[Size]:
        return list(EXAMPLES)

    def positions(self, segments: Sequence[SegmentLayout], samples: Sequence[SampleImages]) -> Tensor:
        """[3, T] positions as in transformers' ``get_rope_index``: text tokens count up; the tokens of an image or
        video count its steps in time, rows and columns from the current position, and the text after it continues after
        the larger of rows and columns. With timestamps, each step in time counts like an image."""
        parts = []
        for number, segment in enumerate(segments):
            visuals = samples[number].sizes if number < len(samples) else []
            offset = position = 0
            for span, visual in zip(segment.spans, visuals, strict=True):
                steps, *sides = self.patch_grid(visual)
                rows, columns = (side // self.merge_size for side in sides)
                runs = span.runs or ((span.start, span.length),)
                times = np.zeros(1, dtype=np.int64)
                if isinstance(visual, Clip) and not self.timestamps:
                    times = self._times(visual, steps)
                for start, length in runs:
                    parts.append(_text(position, start - offset))
                    position += start - offset
                    grid = np.indices((len(times), rows, columns))
                    grid[0] = times[:, None, None]
                    parts.append(position + grid.reshape(3, -1))
                    position += max(rows, columns)
                    offset = start + length
            parts.append(_text(position, segment.length - offset))
        return torch.from_numpy(np.ascontiguousarray(np.concatenate(parts, axis=1)))


def resized_frame(
    clip: Clip, factor: int, steps: int, min_pixels: int, max_pixels: int, settings: VideoSettings
) -> tuple[int, int]:
    """Height and width of the frames in Qwen2-VL and Qwen2.5-VL: each frame has ``min_pixels`` to ``max_pixels``.

    Source: ``Qwen2VLVideoProcessor`` of transformers.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize  # needs Pillow

    if settings.cap_pixels_per_frame:
        budget = int(settings.max_video_tokens * factor * factor * 0.9)
        max_pixels = max(min(max_pixels, budget * steps // len(clip.indices)), int(min_pixels * 1.05))
    height, width = smart_resize(*clip.size, factor, min_pixels=min_pixels, max_pixels=max_pixels)
    return height, width


def resized_clip(
    clip: Clip, factor: int, steps: int, min_pixels: int, max_pixels: int, settings: VideoSettings
) -> tuple[int, int]:
    """Height and width of the frames in Qwen3-VL and Qwen3.5: all frames together have ``min_pixels`` to
    ``max_pixels``.

    Source: ``Qwen3VLVideoProcessor`` of transformers.
    """
    frames, (height, width) = max(len(clip.indices), steps), clip.size
    if settings.cap_pixels_per_frame:
        cap = settings.max_video_tokens * factor * factor
        max_pixels = frames * max(min(cap, max_pixels // frames), int(min_pixels * 1.05))
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    rounded = tuple(round(side / factor) * factor for side in (height, width))
    volume = round(frames / steps) * steps * rounded[0] * rounded[1]
    if volume > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        return tuple(max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))  # type: ignore[return-value]
    if volume < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        return tuple(math.ceil(side * grow / factor) * factor for side in (height, width))  # type: ignore[return-value]
    return rounded  # type: ignore[return-value]


def _text(position: int, length: int) -> np.ndarray:
    return np.broadcast_to(np.arange(position, position + length), (3, length))


def merged_grids(config: Any, inputs: Mapping[str, Any]) -> list[Grids]:
    """One grid of merged patches per image."""
    merge = config.vision_config.spatial_merge_size
    return [((rows // merge, columns // merge),) for _, rows, columns in inputs["image_grid_thw"].tolist()]


def merged_videos(config: Any, inputs: Mapping[str, Any]) -> list[tuple[Grids, int]]:
    """For each video, one grid of merged patches for each step in time."""
    merge = config.vision_config.spatial_merge_size
    return [
        (((rows // merge, columns // merge),) * steps, steps)
        for steps, rows, columns in inputs["video_grid_thw"].tolist()
    ]


def rope_index(base: HFModule, inputs: dict[str, Any]) -> Tensor:
    """[3, B, L] positions from ``input_ids``, ``attention_mask``, ``image_grid_thw``, ``video_grid_thw`` and
    ``second_per_grid_ts``; the last three may be missing."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    seconds = inputs.get("second_per_grid_ts")
    return base.get_rope_index(
        input_ids=ids,
        mm_token_type_ids=(ids == base.config.image_token_id).int() + 2 * (ids == base.config.video_token_id).int(),
        image_grid_thw=inputs.get("image_grid_thw"),
        video_grid_thw=inputs.get("video_grid_thw"),
        attention_mask=None if mask is None else mask[:, mask.shape[1] - ids.shape[1] :],
        **({} if seconds is None else {"second_per_grid_ts": seconds}),
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
        "placeholder": VISION.format(IMAGE),
        "videos": FRAMES_OF_ANY_SIZE,
        "video_token": "<|video_pad|>",
        "template_video": VISION.format(VIDEO),
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
