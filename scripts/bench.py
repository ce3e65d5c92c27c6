#!/usr/bin/env python
"""Benchmark a training step: padded transformers model, packed dense, packed PyramidDrop.

    python scripts/bench.py --device cpu --geometry small [--step] [--json FILE]
    python scripts/bench.py --suite video --device cpu [--json FILE]
    python scripts/bench.py --suite generate --device cpu --geometry small [--json FILE]
    python scripts/bench.py --suite save --geometry save [--zero_stage 2] [--folder DIR] [--json FILE]

All configurations use the same samples of mixed lengths and the whole LLaVA-NeXT, forward and backward (with --step
also an AdamW step), in interleaved repeats. Reports the median, min and max, and ratios. The suite ``video`` does the
same with a small Qwen2.5-VL on videos (``bench_video.py``). The suite ``generate`` measures prefill, decoding and cache
(``bench_generate.py``), and the suite ``save`` how long a checkpoint blocks training (``bench_save.py``).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_generate
import bench_rows
import bench_video
from bench_rows import (
    Row,
    environment,
    pack_samples,
    padded_texts,
    print_report,
    random_ids,
    repeat,
    rows_of,
    synchronize,
    training_report,
)
from vtprune_train import PyramidDrop, prune
from vtprune_train.core.flops import DecoderGeometry, TrainingCost
from vtprune_train.core.stream import ImageSpan, PackedBatch, SegmentLayout
from vtprune_train.models import HFModule
from vtprune_train.models.families import KNOWN_CONFIGS
from vtprune_train.models.families.layout import NEWLINE
from vtprune_train.models.families.llava_next import AnyRes
from vtprune_train.models.families.towers import tile_tower
from vtprune_train.models.forward.recompute import checkpoint_activations
from vtprune_train.pruning.base import PruningMethod

IMAGE_TOKEN = 3
BLOCK = 336


@dataclass(frozen=True)
class Geometry:
    """Model sizes, and the samples: ``(height, width)`` of each image and its text tokens. ``pinpoints``: AnyRes
    resolutions (default: LLaVA-NeXT's)."""

    text: dict[str, Any]
    vision: dict[str, Any]
    samples: tuple[tuple[tuple[int, int], int], ...]
    pinpoints: tuple[tuple[int, int], ...] = ()
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False


def llama(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": 4096,
        "max_position_embeddings": 8192,
    }


def clip(hidden: int, layers: int, heads: int, tile: int = BLOCK) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": tile,
        "patch_size": 14,
    }


# Image sizes with about 2,900, 1,700, 2,300 and 1,100 AnyRes tokens, similar to the instruction data.
MIXED = (((672, 672), 180), ((336, 672), 60), ((500, 667), 121), ((200, 640), 40))
GEOMETRIES = {
    "tiny": Geometry(
        llama(64, 176, 8, 4),
        clip(32, 3, 2, tile=56),
        (((112, 112), 30), ((56, 112), 12), ((100, 112), 20)),
        pinpoints=((56, 112), (112, 56), (112, 112)),
    ),
    "small": Geometry(llama(384, 1024, 16, 6), clip(64, 6, 4), MIXED),
    "save": Geometry(llama(1024, 2816, 8, 16), clip(64, 2, 4), (((200, 640), 8),)),
    "7b": Geometry({}, {}, (*MIXED, ((600, 600), 121), ((640, 480), 121)), dtype=torch.bfloat16, checkpointing=True),
}


def build(geometry: Geometry, device: torch.device) -> tuple[HFModule, AnyRes]:
    """A LLaVA-NeXT with random weights."""
    is_7b = not geometry.text
    config = LlavaNextConfig(
        text_config=KNOWN_CONFIGS["lmsys/vicuna-7b-v1.5"]() if is_7b else LlamaConfig(**geometry.text),
        vision_config=(
            KNOWN_CONFIGS["openai/clip-vit-large-patch14-336"]() if is_7b else CLIPVisionConfig(**geometry.vision)
        ),
        image_token_id=IMAGE_TOKEN,
        **({"image_grid_pinpoints": [list(size) for size in geometry.pinpoints]} if geometry.pinpoints else {}),
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(geometry.dtype)
    with device:
        model = LlavaNextForConditionalGeneration(config)
    torch.set_default_dtype(default)
    model.train()
    if geometry.checkpointing:
        checkpoint_activations(model)
    return model, AnyRes.of(config)


@dataclass
class Samples:
    """The samples, both as packed segments and as padded transformers inputs."""

    segments: list[SegmentLayout]
    ids: list[np.ndarray]
    tiles: torch.Tensor
    visual_index: np.ndarray
    padded: dict[str, torch.Tensor]
    num_tiles: np.ndarray


def segment_of(visual: int, text: int) -> SegmentLayout:
    """Build one sample with an image of ``visual`` tokens."""
    return bench_rows.segment_of(ImageSpan(1, visual), text)


def make_samples(geometry: Geometry, anyres: AnyRes, vocab: int, device: torch.device) -> Samples:
    """Random text and images: a third of the text is the question, the rest the answer."""
    rng = np.random.default_rng(0)
    segments, ids, index, tiles = [], [], [], 0
    for size, text in geometry.samples:
        visual = anyres.visual_index(size)
        segments.append(segment_of(len(visual), text))
        ids.append(random_ids(segments[-1], IMAGE_TOKEN, vocab, rng))
        index.append(np.where(visual == NEWLINE, NEWLINE, visual + tiles * anyres.patches_per_tile))
        tiles += anyres.num_tiles(size)
    flat = np.concatenate(index)
    counts = np.array([anyres.num_tiles(size) for size, _ in geometry.samples])
    pixels = torch.randn(tiles, 3, anyres.tile_size, anyres.tile_size, device=device, dtype=geometry.dtype)
    grid = torch.zeros(len(ids), int(counts.max()), *pixels.shape[1:], device=device, dtype=geometry.dtype)
    for row, (part, count) in enumerate(zip(pixels.split(counts.tolist()), counts, strict=True)):
        grid[row, :count] = part
    padded = {
        **padded_texts(segments, ids),
        "image_sizes": torch.tensor([size for size, _ in geometry.samples]),
        "pixel_values": grid,
    }
    padded = {key: value.to(device) for key, value in padded.items()}
    return Samples(
        segments, ids, pixels, np.where(flat == NEWLINE, tiles * anyres.patches_per_tile, flat), padded, counts
    )


def pack(samples: Samples, method: PruningMethod | None, num_layers: int, device: torch.device) -> PackedBatch:
    vision = {"visual_index": torch.from_numpy(samples.visual_index), "pixel_values": samples.tiles}
    return pack_samples(samples.segments, samples.ids, method, num_layers, vision).to(device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=("train", "video", "generate", "save"), default="train")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--geometry", choices=tuple(GEOMETRIES), default="small")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--step", action="store_true", help="include an AdamW step")
    parser.add_argument("--decode_steps", type=int, default=16, help="decoding steps per repeat (generate suite)")
    parser.add_argument("--zero_stage", type=int, choices=(0, 1, 2), default=2, help="ZeRO stage (save suite)")
    parser.add_argument("--folder", type=Path, help="checkpoint folder (default: temporary) (suite save)")
    parser.add_argument("--skip_padded", action="store_true", help="skip the padded transformers model")
    parser.add_argument("--json", type=Path, help="also write results to this JSON file")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device")
    if arguments.suite == "video" and arguments.geometry not in bench_video.GEOMETRIES:
        parser.error(f"--suite video has the geometries {', '.join(bench_video.GEOMETRIES)}")
    report = {"train": run, "video": bench_video.run, "generate": run_generation, "save": run_saves}[arguments.suite](
        arguments
    )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def run_generation(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device)
    geometry = GEOMETRIES[arguments.geometry]
    model, anyres = build(geometry, device)
    result = bench_generate.run(
        model, anyres, geometry.samples, arguments.repeats, arguments.decode_steps, lambda: synchronize(device)
    )
    result |= {"suite": "generate", **environment(arguments, device)}
    print(f"{result['device']}, torch {result['torch']}, geometry {arguments.geometry}, {arguments.repeats} repeats\n")
    bench_generate.print_report(result)
    return result


def run_saves(arguments: argparse.Namespace) -> dict[str, Any]:
    import bench_save  # requires DeepSpeed; the other suites do not

    device = torch.device(arguments.device)
    geometry = GEOMETRIES[arguments.geometry]
    model, anyres = build(geometry, device)
    samples = make_samples(geometry, anyres, model.config.text_config.vocab_size, device)
    method = PyramidDrop()
    batch = pack(samples, method, model.config.text_config.num_hidden_layers, device)
    result = bench_save.run(prune(model, method), batch, arguments.repeats, arguments.zero_stage, arguments.folder)
    result |= {"suite": "save", **environment(arguments, device)}
    print(f"{result['device']}, torch {result['torch']}, geometry {arguments.geometry}, {arguments.repeats} repeats\n")
    bench_save.print_report(result)
    return result


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device)
    geometry = GEOMETRIES[arguments.geometry]
    model, anyres = build(geometry, device)
    samples = make_samples(geometry, anyres, model.config.text_config.vocab_size, device)
    rows = make_rows(model, samples, device)
    if arguments.skip_padded:
        rows = rows[1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) if arguments.step else None
    repeat(rows, model, optimizer, device, arguments.repeats)
    report = training_report(rows, samples.segments, arguments, device)
    print_report(report)
    return report


def make_rows(model: HFModule, samples: Samples, device: torch.device) -> list[Row]:
    num_layers = model.config.text_config.num_hidden_layers
    cost = TrainingCost(DecoderGeometry.of(model.config.text_config), tile_tower(model.config), True, True)
    methods: dict[str, PruningMethod | None] = {
        "dense": None,
        "pyramiddrop_next_layer": PyramidDrop(rank_with="next_layer"),
        "pyramiddrop_this_layer": PyramidDrop(rank_with="this_layer"),
    }
    batches = {name: (method, pack(samples, method, num_layers, device)) for name, method in methods.items()}
    return rows_of(model, samples.padded, batches, cost, float(cost.vision(samples.num_tiles).sum()))


if __name__ == "__main__":
    sys.exit(main())
