"""The video suite of ``bench.py``: a training step on videos of 64 frames.

A small Qwen2.5-VL with random weights runs forward and backward on videos of several resolutions, so that samples
differ in length: padded in transformers, and packed without dropping, with PyramidDrop and with EVS.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from bench_rows import (
    Row,
    pack_samples,
    padded_texts,
    print_report,
    random_ids,
    repeat,
    rows_of,
    segment_of,
    training_report,
)
from vtprune_train import EVS, PyramidDrop
from vtprune_train.core.flops import DecoderGeometry, TrainingCost
from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.models import HFModule
from vtprune_train.models.families import qwen2_5_vl
from vtprune_train.models.families.base import required
from vtprune_train.models.families.layout import Clip, ImageLayout, SampleImages
from vtprune_train.models.families.qwen import FRAMES_OF_ANY_SIZE, MergedPatches, image_processor
from vtprune_train.pruning.base import PruningMethod

FPS, SAMPLED_FPS = 30.0, 2  # frames per second of the files, and of the sampled frames
TOKENS = {"image_token_id": 0, "video_token_id": 1, "vision_start_token_id": 2, "vision_end_token_id": 3}
# Frames are multiples of 28 pixels, so they are not resized.
SETTINGS = dataclasses.replace(FRAMES_OF_ANY_SIZE, size=(("longest_edge", 768 * 28 * 28), ("shortest_edge", 28 * 28)))


@dataclass(frozen=True)
class VideoGeometry:
    """Model sizes, and the samples: ``(height, width)`` of each video of ``frames`` frames and its text tokens."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    frames: int
    samples: tuple[tuple[tuple[int, int], int], ...]

    def config(self) -> Qwen2_5_VLConfig:
        half = self.hidden // self.heads // 2  # rotary frequencies of a head, divided into time, height and width
        sides = 3 * half // 8
        sections = [half - 2 * sides, sides, sides]
        text = {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads // 2,
            "vocab_size": 4096,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
            "bos_token_id": None,
            "eos_token_id": None,
        }
        vision = {
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": self.hidden,
            "fullatt_block_indexes": [3],
        }
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **TOKENS)


# Videos of 16:9, a square one and two of low resolution: 112, 100, 60 and 64 tokens for each of their 32 steps in time.
GEOMETRIES = {
    "tiny": VideoGeometry(64, 176, 8, 4, 6, (((56, 84), 30), ((56, 56), 12))),
    "small": VideoGeometry(
        256, 688, 8, 4, 64, (((224, 392), 120), ((280, 280), 60), ((168, 280), 121), ((224, 224), 40))
    ),
}


@dataclass
class VideoSamples:
    """The samples: segments, token ids, and each sample's video."""

    layout: ImageLayout
    segments: list[SegmentLayout]
    ids: list[np.ndarray]
    videos: list[SampleImages]

    @classmethod
    def of(cls, geometry: VideoGeometry, config: Qwen2_5_VLConfig) -> VideoSamples:
        """Random text and frames."""
        layout = MergedPatches.of(config, image_processor(config)).with_videos(SETTINGS)
        rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
        segments, ids, videos = [], [], []
        step = int(FPS / SAMPLED_FPS)
        for size, text in geometry.samples:
            clip = Clip(*size, tuple(range(0, step * geometry.frames, step)), step * geometry.frames, FPS)
            tokens = layout.video_tokens(clip)
            segments.append(segment_of(ImageSpan(1, tokens.total, tokens.grids, tokens.frames), text))
            ids.append(random_ids(segments[-1], config.video_token_id, config.text_config.vocab_size, rng))
            vision = config.vision_config
            values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
            videos.append(SampleImages([clip], [torch.randn(tokens.tiles, values, generator=generator)]))
        return cls(layout, segments, ids, videos)

    def padded(self, video_token: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Inputs of the transformers model."""
        texts = padded_texts(self.segments, self.ids)
        every = SampleImages([v.sizes[0] for v in self.videos], [v.pixels[0] for v in self.videos])
        kinds = {"mm_token_type_ids": 2 * (texts["input_ids"] == video_token).int()}
        return {key: value.to(device) for key, value in {**texts, **kinds, **self.layout.model_inputs(every)}.items()}

    def vision(self) -> dict[str, Any]:
        """The fields of a packed batch that describe the videos."""
        inputs = self.layout.vision_inputs(self.videos)._asdict()
        return {**inputs, "positions": self.layout.positions(self.segments, self.videos)}


def build(geometry: VideoGeometry, device: torch.device) -> HFModule:
    torch.manual_seed(0)
    with device:
        model = Qwen2_5_VLForConditionalGeneration(geometry.config())
    model.train()
    return model


def make_rows(model: HFModule, samples: VideoSamples, device: torch.device) -> list[Row]:
    config = model.config
    num_layers = config.text_config.num_hidden_layers
    tower = required(qwen2_5_vl.FAMILY.flops, "the video suite")(config)
    cost = TrainingCost(DecoderGeometry.of(config.text_config), tower, True, True)
    methods: dict[str, PruningMethod | None] = {
        "dense": None,
        "pyramiddrop": PyramidDrop(positions="keep"),
        "evs": EVS(),
    }
    vision = samples.vision()
    batches = {
        name: (method, pack_samples(samples.segments, samples.ids, method, num_layers, vision).to(device))
        for name, method in methods.items()
    }
    counted = [samples.layout.video_tokens(video.sizes[0]) for video in samples.videos]
    tiles, frames = np.array([of.tiles for of in counted]), np.array([of.frames for of in counted])
    padded = samples.padded(config.video_token_id, device)
    return rows_of(model, padded, batches, cost, float(cost.vision(tiles, frames).sum()))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device, geometry = torch.device(arguments.device), GEOMETRIES[arguments.geometry]
    model = build(geometry, device)
    samples = VideoSamples.of(geometry, model.config)
    rows = make_rows(model, samples, device)[1 if arguments.skip_padded else 0 :]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) if arguments.step else None
    repeat(rows, model, optimizer, device, arguments.repeats)
    report = {"suite": "video", "frames": geometry.frames, **training_report(rows, samples.segments, arguments, device)}
    print_report(report)
    return report
