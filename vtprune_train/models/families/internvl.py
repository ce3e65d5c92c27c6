"""InternVL in transformers' format: the tiles of an image, followed by a thumbnail if there are several tiles, in one
run of image tokens.

Each visual token merges four patches (pixel shuffle).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import GotOcr2ImageProcessorPil, InternVLConfig, Qwen3Config

from vtprune_train.core.flops import TowerGeometry
from vtprune_train.core.stream import IMAGE
from vtprune_train.models.families.base import LLAMA_LIKE, Family, Loop
from vtprune_train.models.families.layout import (
    Clip,
    ImageLayout,
    SampleImages,
    Size,
    VisionInputs,
    Visual,
    VisualTokens,
)
from vtprune_train.models.families.places import Places, grid_places
from vtprune_train.models.families.towers import SavedByTower, feature_states, patch_grid
from vtprune_train.models.families.videos import Sampling, VideoSettings

if TYPE_CHECKING:  # pruning a model does not need Pillow
    from PIL import Image

# InternVLProcessor sets this in every call and overrides the image processor's file.
ALWAYS = {"crop_to_patches": True}
PLACEHOLDER = f"<img>{IMAGE}</img>"


@dataclass(frozen=True)
class TilesAndThumbnail(ImageLayout):
    """Layout with ``rows`` x ``columns`` tokens per tile of ``tile_size`` pixels, and ``min_tiles`` to ``max_tiles``
    tiles without the thumbnail.

    Source: ``GotOcr2ImageProcessor`` of transformers.
    """

    tile_size: Size
    rows: int
    columns: int
    min_tiles: int
    max_tiles: int
    video: VideoSettings | None = None

    @classmethod
    def of(cls, config: Any, image_processor: Any) -> TilesAndThumbnail:
        """The layout for an ``InternVLConfig`` and the checkpoint's image processor."""
        rows, columns = (int(patches * config.downsample_ratio) for patches in patch_grid(config.vision_config))
        size = image_processor.size
        limits = (image_processor.min_patches, image_processor.max_patches)
        if not image_processor.crop_to_patches:
            limits = (1, 1)
        return cls((size["height"], size["width"]), rows, columns, *limits)

    def grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns of tiles."""
        if self.max_tiles == 1:
            return 1, 1
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas  # needs Pillow

        columns, rows = get_optimal_tiled_canvas(tuple(size), self.tile_size, self.min_tiles, self.max_tiles)
        return rows, columns

    def tiles(self, sizes: Sequence[Size]) -> list[int]:
        counts = [rows * columns for rows, columns in map(self.grid, sizes)]
        return [count + 1 if count > 1 else 1 for count in counts]

    def tokens(self, sizes: Sequence[Size]) -> list[int]:
        return [tiles * self.rows * self.columns for tiles in self.tiles(sizes)]

    def pixels(self, image_processor: Any, images: Sequence[Image.Image]) -> list[Tensor]:
        """[tiles, 3, height, width] of each image."""
        return [image_processor(images=image, return_tensors="pt")["pixel_values"] for image in images]

    def vision_inputs(self, samples: Sequence[SampleImages]) -> VisionInputs:
        every = [pixels for sample in samples for pixels in sample.pixels]
        tokens = sum(len(pixels) for pixels in every) * self.rows * self.columns
        pixels = torch.cat(every) if every else torch.zeros(1, 3, *self.tile_size)
        return VisionInputs(pixels, torch.arange(tokens), image_inputs={})

    def with_videos(self, settings: VideoSettings) -> TilesAndThumbnail:
        if settings.edges != dict(zip(("height", "width"), self.tile_size, strict=True)):
            raise ValueError(
                f"the video processor resizes frames to {settings.edges}, but a tile of the tower has {self.tile_size} "
                "pixels; set `size` in video_preprocessor_config.json"
            )
        return dataclasses.replace(self, video=settings)

    def video_tokens(self, clip: Clip) -> VisualTokens:
        """Each frame is one tile and counts as a separate image, as in the model's own inputs."""
        frames = len(clip.indices)
        return VisualTokens((self.rows * self.columns,) * frames, frames, 0, ((self.rows, self.columns),) * frames)

    def video_pixels(self, clip: Clip, frames: np.ndarray) -> Tensor:
        """[frames, 3, height, width]."""
        assert self.video is not None, "the layout was built without videos"
        return self.video.prepare(frames, self.tile_size)

    def frame_size(self, clip: Clip) -> Size:
        return self.tile_size

    def placeholder(self, visual: Visual) -> str | None:
        if not isinstance(visual, Clip):
            return None
        return "\n".join(f"Frame{number}: {PLACEHOLDER}" for number in range(1, len(visual.indices) + 1))

    def model_inputs(self, images: SampleImages) -> dict[str, Tensor]:
        return {"pixel_values": torch.cat(images.pixels)} if images.pixels else {}

    def places(self, sizes: Sequence[Size], image_processor: Any) -> list[Places]:
        """Positions tile by tile, in each tile row by row, then those of the thumbnail. The image is resized to fill
        the tiles, ignoring its aspect ratio."""
        return [self._places(size) for size in sizes]

    def _places(self, size: Size) -> Places:
        rows, columns = self.grid(size)
        tiles = grid_places(*size, rows * self.rows, columns * self.columns).boxes
        tiles = tiles.reshape(rows, self.rows, columns, self.columns, 4).transpose(0, 2, 1, 3, 4).reshape(-1, 4)
        thumbnail = grid_places(*size, self.rows, self.columns).boxes[: None if rows * columns > 1 else 0]
        kinds = np.array(["grid"] * len(tiles) + ["base"] * len(thumbnail))
        return Places(size, kinds, np.concatenate([tiles, thumbnail]))

    def examples(self) -> list[Size]:
        height, width = self.tile_size
        return [(height, width), (height, 2 * width), (2 * height, 2 * width), (3 * height, 4 * width)]


def _flops(config: Any) -> TowerGeometry:
    vision = config.vision_config
    rows, columns = patch_grid(vision)
    merge = int(1 / config.downsample_ratio) ** 2
    return TowerGeometry(
        num_layers=vision.num_hidden_layers,
        hidden=vision.hidden_size,
        intermediate=vision.intermediate_size,
        patches=rows * columns,
        patch_size=vision.patch_size[0],
        projector_in=vision.hidden_size * merge,
        projector_out=config.text_config.hidden_size,
        merge=merge,
    )


def _counting(config: Any) -> dict[str, Any]:
    rows, columns = patch_grid(config.vision_config)
    return {"image_seq_length": int(rows * columns * config.downsample_ratio**2)}


def _image_processor(config: Any) -> GotOcr2ImageProcessorPil:
    height, width = config.vision_config.image_size
    return GotOcr2ImageProcessorPil(size={"height": height, "width": width}, **ALWAYS)


def _saved(config: Any) -> SavedByTower:
    """Activations of LayerNorms or RMSNorms, separate projections, layer scales and an MLP of two matrices."""
    vision = config.vision_config
    c, m = vision.hidden_size, vision.intermediate_size
    in_layer = 2 if vision.norm_type == "rms_norm" else 0
    of_heads = 2 if vision.use_qk_norm else 0
    return SavedByTower(
        layers=max(feature_states(config)),
        tokens=int(np.prod(patch_grid(vision))) + 1,
        hidden=c,
        intermediate=m,
        elements=(10 + of_heads) * c + 2 * m,
        # Means and deviations of LayerNorms; the input of RMSNorms in float32, and their scale.
        raw_bytes=8 * (2 - in_layer) + (4 * c + 4) * (in_layer + of_heads) + 4 * vision.num_attention_heads,
        projector=2 * c + 3 * int(config.text_config.hidden_size * config.downsample_ratio**2),
    )


def _untrained(config: Any, name: str) -> bool:
    """The mask token, and the parameters after the layer whose output is used."""
    if "embeddings.mask_token" in name:
        return True
    if config.vision_feature_layer == -1:
        return False
    _, in_layer, rest = name.partition("encoder.layer.")
    if in_layer:
        return int(rest.partition(".")[0]) >= max(feature_states(config))
    return "vision_tower.layernorm." in name


def _internvl3_5_8b() -> InternVLConfig:
    """The published InternVL3.5 8B: InternViT-300M and Qwen3-8B."""
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "attention_bias": True,
        "image_size": [448, 448],
        "patch_size": [14, 14],
    }
    text = Qwen3Config(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
    )
    return InternVLConfig(vision_config=vision, text_config=text, image_token_id=151671, tie_word_embeddings=False)


FAMILY = Family(
    title="InternVL",
    model_type="internvl",
    model_class="InternVLForConditionalGeneration",
    text_types=LLAMA_LIKE,
    run_is_one_image=True,
    flops=_flops,
    counting=_counting,
    image_settings=ALWAYS,
    known={"OpenGVLab/InternVL3_5-8B-HF": _internvl3_5_8b},
    loop=Loop(
        layout=TilesAndThumbnail.of,
        image_processor=_image_processor,
        image_processors=("GotOcr2ImageProcessor",),
        saved=_saved,
        projector=("model.multi_modal_projector.",),
        untrained=_untrained,
        image_token="<IMG_CONTEXT>",
        placeholder=PLACEHOLDER,
        template_image=IMAGE,
        videos=VideoSettings(Sampling("middle", None, 8), (("height", 448), ("width", 448))),
        video_token="",
        needs_checkpoint=True,
    ),
)
