#!/usr/bin/env python
"""Benchmark a training step: padded transformers model, packed dense, packed PyramidDrop.

    python scripts/bench.py --device cpu --geometry small [--step] [--json FILE]
    python scripts/bench.py --suite generate --device cpu --geometry small [--json FILE]
    python scripts/bench.py --suite save --geometry save [--zero_stage 2] [--folder DIR] [--json FILE]

All configurations use the same samples of mixed lengths and the whole LLaVA-NeXT, forward and backward (with --step
also an AdamW step), in interleaved repeats. Reports the median, min and max, and ratios. The suite ``generate``
measures prefill, decoding and cache instead (``bench_generate.py``), the ``save`` suite measures how long a checkpoint
blocks training (``bench_save.py``).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_generate
from vtprune_train import PyramidDrop, prune, unprune
from vtprune_train.core.flops import DecoderGeometry, TrainingCost, selector_flops
from vtprune_train.core.plan import plan_pass
from vtprune_train.core.stream import IGNORE, ImageSpan, PackedBatch, SegmentLayout
from vtprune_train.models import HFModule
from vtprune_train.models.families import KNOWN_CONFIGS
from vtprune_train.models.families.layout import NEWLINE
from vtprune_train.models.families.llava_next import AnyRes
from vtprune_train.models.families.towers import tile_tower
from vtprune_train.models.forward.decoder import RANGES, SELECTOR
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
    """Build one sample: a text token, the image, a question (a third of the text) and a supervised answer."""
    question = max(4, text // 3)
    first = question + visual
    return SegmentLayout(text + visual, (ImageSpan(1, visual),), (first - 1,), tuple(range(first, text + visual)))


def make_samples(geometry: Geometry, anyres: AnyRes, vocab: int, device: torch.device) -> Samples:
    """Random text and images: a third of the text is the question, the rest the answer."""
    rng = np.random.default_rng(0)
    segments, ids, index, tiles, labels = [], [], [], 0, []
    for size, text in geometry.samples:
        tokens = rng.integers(5, vocab, text + 1)
        tokens[1] = IMAGE_TOKEN
        visual = anyres.visual_index(size)
        expanded = np.repeat(tokens, np.where(np.arange(text + 1) == 1, len(visual), 1))
        segment = segment_of(len(visual), text)
        segments.append(segment)
        ids.append(expanded)
        label = np.full(len(expanded), IGNORE)
        label[list(segment.supervised_offsets)] = expanded[list(segment.supervised_offsets)]
        labels.append(label)
        index.append(np.where(visual == NEWLINE, NEWLINE, visual + tiles * anyres.patches_per_tile))
        tiles += anyres.num_tiles(size)
    flat = np.concatenate(index)
    counts = np.array([anyres.num_tiles(size) for size, _ in geometry.samples])
    pixels = torch.randn(tiles, 3, anyres.tile_size, anyres.tile_size, device=device, dtype=geometry.dtype)
    longest = max(map(len, ids))
    grid = torch.zeros(len(ids), int(counts.max()), *pixels.shape[1:], device=device, dtype=geometry.dtype)
    for row, (part, count) in enumerate(zip(pixels.split(counts.tolist()), counts, strict=True)):
        grid[row, :count] = part
    padded = {
        "input_ids": torch.tensor(np.stack([np.pad(i, (0, longest - len(i))) for i in ids])),
        "attention_mask": torch.tensor(np.stack([np.arange(longest) < len(i) for i in ids])).long(),
        "labels": torch.tensor(np.stack([np.pad(x, (0, longest - len(x)), constant_values=IGNORE) for x in labels])),
        "image_sizes": torch.tensor([size for size, _ in geometry.samples]),
        "pixel_values": grid,
    }
    padded = {key: value.to(device) for key, value in padded.items()}
    return Samples(
        segments, ids, pixels, np.where(flat == NEWLINE, tiles * anyres.patches_per_tile, flat), padded, counts
    )


def pack(samples: Samples, method: PruningMethod | None, num_layers: int, device: torch.device) -> PackedBatch:
    plan = plan_pass(samples.segments, num_layers, method)
    ids = np.concatenate(samples.ids)
    starts = np.cumsum([0, *map(len, samples.ids)])
    supervised = [
        start + offset for s, start in zip(samples.segments, starts, strict=False) for offset in s.supervised_offsets
    ]
    targets = torch.from_numpy(ids[supervised])
    return PackedBatch(
        input_ids=torch.from_numpy(ids),
        visual_rows=torch.from_numpy(np.flatnonzero(ids == IMAGE_TOKEN)),
        visual_index=torch.from_numpy(samples.visual_index),
        pixel_values=samples.tiles,
        plan=plan,
        targets=targets,
        answer_of_target=torch.zeros_like(targets),
        num_answers=1,
    ).to(device)


@dataclass
class Row:
    """One benchmark configuration and its measurements."""

    name: str
    method: PruningMethod | None
    run: Callable[[], torch.Tensor]
    flops: float
    seconds: list[float] = field(default_factory=list)
    selector_seconds: list[float] = field(default_factory=list)
    peak_memory: int = 0


def range_seconds(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Seconds that a call spends in each profiler range of :mod:`vtprune_train.models.forward.decoder`. On CUDA this is
    kernel time, read from the profiler afterwards, so that the call does not synchronize."""
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        run()
        synchronize(device)
    seconds = dict.fromkeys(RANGES, 0.0)
    for event in profiler.events():
        if event.name in seconds and event.device_type == DeviceType.CPU:
            kernels = sum(child.device_time_total for child in event.cpu_children)
            seconds[event.name] += 1e-6 * (kernels if on_cuda else event.cpu_time_total)
    return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(row: Row, model: HFModule, optimizer: torch.optim.Optimizer | None, device: torch.device) -> None:
    """One repeat: forward, backward and optionally an optimizer step."""
    if row.name != "hf_padded":
        prune(model, row.method)
    reset_peak(device)
    synchronize(device)
    began = time.perf_counter()
    row.run().backward()
    if optimizer is not None:
        optimizer.step()
    synchronize(device)
    row.seconds.append(time.perf_counter() - began)
    model.zero_grad(set_to_none=True)
    row.peak_memory = max(row.peak_memory, peak_memory(device))
    if row.method is not None:
        seconds = range_seconds(row.run, device)
        row.selector_seconds.append(sum(seconds[name] for name in SELECTOR))
    if row.name != "hf_padded":
        unprune(model)


def reset_peak(device: torch.device) -> None:
    """Reset the memory peak: the allocator's on CUDA, the process's resident size (Linux) on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak since :func:`reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def check_no_sync(rows: list[Row], model: HFModule) -> None:
    """On CUDA, run each packed forward pass with sync debug mode "error" to check that it does not synchronize."""
    for row in rows:
        if row.name == "hf_padded":
            continue
        prune(model, row.method)
        torch.cuda.set_sync_debug_mode("error")
        try:
            row.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            unprune(model)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=("train", "generate", "save"), default="train")
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
    report = {"train": run, "generate": run_generation, "save": run_saves}[arguments.suite](arguments)
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


def environment(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    threads = f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else threads,
        "geometry": arguments.geometry,
        "repeats": arguments.repeats,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device)
    geometry = GEOMETRIES[arguments.geometry]
    model, anyres = build(geometry, device)
    samples = make_samples(geometry, anyres, model.config.text_config.vocab_size, device)
    rows = make_rows(model, samples, device)
    if arguments.skip_padded:
        rows = rows[1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) if arguments.step else None
    if device.type == "cuda":
        for row in rows:
            measure(row, model, optimizer, device)
            row.seconds.clear()
            row.selector_seconds.clear()
        check_no_sync(rows, model)
    for _ in range(arguments.repeats):
        for row in rows:
            measure(row, model, optimizer, device)
    report = make_report(rows, samples, arguments, device)
    print_report(report)
    return report


def make_rows(model: HFModule, samples: Samples, device: torch.device) -> list[Row]:
    num_layers = model.config.text_config.num_hidden_layers
    cost = TrainingCost(DecoderGeometry.of(model.config.text_config), tile_tower(model.config), True, True)
    supervised = np.array([len(segment.supervised_offsets) for segment in samples.segments])
    longest = max(map(len, samples.ids))

    def padded() -> torch.Tensor:
        return model(**samples.padded, use_cache=False).loss

    # The padded model pads to the longest sample and computes logits for all positions.
    lengths = np.full((len(samples.ids), 1), longest)
    padded_flops = cost.sample(lengths, [num_layers], samples.num_tiles, lengths[:, 0]).sum()
    rows = [Row("hf_padded", None, padded, float(padded_flops))]
    methods: dict[str, PruningMethod | None] = {
        "dense": None,
        "pyramiddrop_next_layer": PyramidDrop(rank_with="next_layer"),
        "pyramiddrop_this_layer": PyramidDrop(rank_with="this_layer"),
    }
    for name, method in methods.items():
        batch = pack(samples, method, num_layers, device)

        def packed(batch: PackedBatch = batch) -> torch.Tensor:
            return model(batch).loss_sum / len(batch.targets)

        lengths = np.array([stage.segment_lengths for stage in batch.plan.stages]).T
        layers = [stage.end_layer - stage.first_layer for stage in batch.plan.stages]
        flops = float(cost.sample(lengths, layers, samples.num_tiles, supervised).sum())
        flops += selector_flops(cost.decoder, batch.plan, method)
        rows.append(Row(name, method, packed, flops))
    return rows


def make_report(
    rows: list[Row], samples: Samples, arguments: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    by_name = {row.name: row for row in rows}
    table = [
        {
            "name": row.name,
            "median_s": statistics.median(row.seconds),
            "min_s": min(row.seconds),
            "max_s": max(row.seconds),
            "flops": row.flops,
            "peak_memory_bytes": row.peak_memory,
            "selector_share": (
                statistics.median(row.selector_seconds) / statistics.median(row.seconds)
                if row.selector_seconds
                else 0.0
            ),
        }
        for row in rows
    ]
    median = {row.name: statistics.median(row.seconds) for row in rows}
    ratios = {}
    for name in ("pyramiddrop_next_layer", "pyramiddrop_this_layer"):
        time_ratio, flop_ratio = median[name] / median["dense"], by_name[name].flops / by_name["dense"].flops
        ratios[name] = {"time": time_ratio, "flops": flop_ratio, "time_over_flops": time_ratio / flop_ratio}
        if "hf_padded" in median:
            ratios[name]["time_over_hf_padded"] = median[name] / median["hf_padded"]
    return {
        **environment(arguments, device),
        "optimizer_step": arguments.step,
        "sample_tokens": [segment.length for segment in samples.segments],
        "rows": table,
        "ratios": ratios,
    }


def print_report(report: dict[str, Any]) -> None:
    print(f"{report['device']}, torch {report['torch']}, geometry {report['geometry']}, {report['repeats']} repeats")
    print(
        f"tokens of the samples: {report['sample_tokens']}, forward + backward{' + step' * report['optimizer_step']}\n"
    )
    print(f"{'':24}{'median s':>9}{'min':>8}{'max':>8}{'TFLOP':>9}{'peak GB':>9}{'selector':>10}")
    for row in report["rows"]:
        print(
            f"{row['name']:24}{row['median_s']:>9.3f}{row['min_s']:>8.3f}{row['max_s']:>8.3f}"
            f"{row['flops'] / 1e12:>9.3f}{row['peak_memory_bytes'] / 1e9:>9.2f}{row['selector_share']:>10.2%}"
        )
    print()
    for name, ratio in report["ratios"].items():
        padded = f", {ratio['time_over_hf_padded']:.3f} of hf_padded" if "time_over_hf_padded" in ratio else ""
        print(
            f"{name}: time {ratio['time']:.3f} of dense, FLOPs {ratio['flops']:.3f}, quotient "
            f"{ratio['time_over_flops']:.3f}{padded}"
        )


if __name__ == "__main__":
    sys.exit(main())
