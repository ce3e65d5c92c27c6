"""The generation suite of ``bench.py``: prefill, decoding and cache size.

Configurations (transformers, packed dense, PyramidDrop with both rankings) use the same left-padded inputs with batch
sizes 1 and 8 and are interleaved. Prefill runs the whole model on the prompt (tower, decoder, one row of logits per
sample); decoding generates one token per sample and step with the cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from vtprune_train import PyramidDrop, prune, unprune
from vtprune_train.core.flops import DecoderGeometry, layers_per_stage, selector_flops, stage_lengths
from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.models import HFModule
from vtprune_train.models.cache import cache_bytes
from vtprune_train.models.families.llava_next import AnyRes
from vtprune_train.models.families.towers import tile_tower
from vtprune_train.pruning.base import PruningMethod

HF = "transformers"
BATCHES = (1, 8)
METHODS: dict[str, PruningMethod | None] = {
    HF: None,
    "dense": None,
    "pyramiddrop_next_layer": PyramidDrop(rank_with="next_layer"),
    "pyramiddrop_this_layer": PyramidDrop(rank_with="this_layer"),
}


@dataclass
class Row:
    """One configuration: times of each repeat and the final cache size."""

    name: str
    method: PruningMethod | None
    batch: int
    flops: float
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)  # per step
    cache: int = 0


def run(
    model: HFModule,
    anyres: AnyRes,
    samples: tuple[tuple[tuple[int, int], int], ...],
    repeats: int,
    steps: int,
    synchronize: Callable[[], None],
) -> dict[str, Any]:
    """Measure all rows.

    Args:
        model: an unpruned LLaVA-NeXT.
        anyres: its AnyRes layout.
        samples: ``(height, width)`` of each image and its text tokens; repeated to fill a batch.
        repeats: repeats per configuration, after one warm-up.
        steps: decoding steps of a repeat.
        synchronize: waits for the device.
    """
    model.eval()
    rows = []
    for batch in BATCHES:
        chosen = [samples[index % len(samples)] for index in range(batch)]
        inputs = make_inputs(model, anyres, chosen)
        configurations = [
            Row(name, method, batch, prefill_flops(model, anyres, chosen, method)) for name, method in METHODS.items()
        ]
        for repeat in range(repeats + 1):
            for row in configurations:
                measure(row, model, inputs, steps, synchronize, counts=repeat > 0)
        rows += configurations
    return report(rows)


def make_inputs(model: HFModule, anyres: AnyRes, samples: list[tuple[tuple[int, int], int]]) -> dict[str, torch.Tensor]:
    """Random images and text, padded on the left."""
    rng = np.random.default_rng(0)
    image, vocab = model.config.image_token_id, model.config.text_config.vocab_size
    counts = [anyres.tokens([size])[0] for size, _ in samples]
    tiles = [anyres.num_tiles(size) for size, _ in samples]
    longest = max(count + text for count, (_, text) in zip(counts, samples, strict=True))
    ids = np.zeros((len(samples), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, (count, (_, text)) in enumerate(zip(counts, samples, strict=True)):
        tokens = np.concatenate([rng.integers(5, vocab, 1), np.full(count, image), rng.integers(5, vocab, text - 1)])
        ids[row, longest - len(tokens) :] = tokens
        mask[row, longest - len(tokens) :] = 1
    size = anyres.tile_size
    pixels = torch.randn(len(samples), max(tiles), 3, size, size, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": torch.from_numpy(ids).to(model.device),
        "attention_mask": torch.from_numpy(mask).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
        "image_sizes": torch.tensor([size for size, _ in samples], device=model.device),
    }


def prefill_flops(
    model: HFModule, anyres: AnyRes, samples: list[tuple[tuple[int, int], int]], method: PruningMethod | None
) -> float:
    """Forward FLOPs of the full model on packed prompts, including ranking."""
    decoder, tower = DecoderGeometry.of(model.config.text_config), tile_tower(model.config).changed(method)
    drops = () if method is None else method.drops(decoder.num_layers)
    spans = np.array([anyres.tokens([size])[0] for size, _ in samples])
    text = np.array([text for _, text in samples])
    lengths = stage_lengths(text, spans, np.arange(len(samples)), drops)
    tiles = sum(anyres.num_tiles(size) for size, _ in samples)
    total = float((decoder.layer(lengths) * np.array(layers_per_stage(drops, decoder.num_layers))).sum())
    total += decoder.head(float(len(samples))) + tower.tower(float(tiles)) + tower.projector(float(tiles))
    if method is not None:
        segments = [
            SegmentLayout(int(span + words), (ImageSpan(1, int(span)),), (int(span + words) - 1,))
            for span, words in zip(spans, text, strict=True)
        ]
        plan = method.plan(segments, decoder.num_layers)
        total += selector_flops(decoder, plan, method)
    return total


@torch.no_grad()
def measure(
    row: Row,
    model: HFModule,
    inputs: dict[str, torch.Tensor],
    steps: int,
    synchronize: Callable[[], None],
    counts: bool,
) -> None:
    """One repeat of one row."""
    if row.name != HF:
        prune(model, row.method)
    cache, mask = DynamicCache(config=model.config), inputs["attention_mask"]
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    synchronize()
    began = time.perf_counter()
    logits = model(**inputs, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    synchronize()
    middle = time.perf_counter()
    for _ in range(steps):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        positions = positions[:, -1:] + 1
        logits = model(
            input_ids=logits[:, -1:].argmax(dim=-1), attention_mask=mask, position_ids=positions,
            past_key_values=cache, use_cache=True,
        ).logits  # fmt: skip
    synchronize()
    ended = time.perf_counter()
    if row.name != HF:
        unprune(model)
    if counts:
        row.prefill.append(middle - began)
        row.decode.append((ended - middle) / steps)
    row.cache = cache_bytes(cache)


def report(rows: list[Row]) -> dict[str, Any]:
    """Median results, and PyramidDrop relative to dense at the same batch size."""
    table: list[dict[str, Any]] = [
        {
            "name": row.name,
            "batch": row.batch,
            "prefill_s": statistics.median(row.prefill),
            "prefill_min_s": min(row.prefill),
            "prefill_max_s": max(row.prefill),
            "decode_s_per_token": statistics.median(row.decode),
            "cache_bytes": row.cache,
            "prefill_flops": row.flops,
        }
        for row in rows
    ]
    ratios = {}
    for row in table:
        if row["name"].startswith("pyramiddrop"):
            dense, hf = (
                next(other for other in table if other["batch"] == row["batch"] and other["name"] == name)
                for name in ("dense", HF)
            )
            flops = row["prefill_flops"] / dense["prefill_flops"]
            prefill = row["prefill_s"] / dense["prefill_s"]
            ratios[f"{row['name']}, batch {row['batch']}"] = {
                "prefill": prefill,
                "prefill_flops": flops,
                "prefill_over_flops": prefill / flops,
                "decode": row["decode_s_per_token"] / dense["decode_s_per_token"],
                "cache": row["cache_bytes"] / dense["cache_bytes"],
                "prefill_over_transformers": row["prefill_s"] / hf["prefill_s"],
                "decode_over_transformers": row["decode_s_per_token"] / hf["decode_s_per_token"],
                "cache_over_transformers": row["cache_bytes"] / hf["cache_bytes"],
            }
    return {"rows": table, "ratios": ratios}


def print_report(result: dict[str, Any]) -> None:
    """The table of :func:`report`."""
    print(f"{'':24}{'batch':>6}{'prefill s':>11}{'min':>8}{'max':>8}{'TFLOP':>8}{'ms/token':>10}{'cache MB':>10}")
    for row in result["rows"]:
        print(
            f"{row['name']:24}{row['batch']:>6}{row['prefill_s']:>11.3f}{row['prefill_min_s']:>8.3f}"
            f"{row['prefill_max_s']:>8.3f}{row['prefill_flops'] / 1e12:>8.3f}{1000 * row['decode_s_per_token']:>10.1f}"
            f"{row['cache_bytes'] / 1e6:>10.1f}"
        )
    print()
    for name, ratio in result["ratios"].items():
        print(
            f"{name}: prefill {ratio['prefill']:.3f} of dense, FLOPs {ratio['prefill_flops']:.3f}, quotient "
            f"{ratio['prefill_over_flops']:.3f}; decoding {ratio['decode']:.3f}, cache {ratio['cache']:.3f}; of "
            f"transformers: prefill {ratio['prefill_over_transformers']:.3f}, decoding "
            f"{ratio['decode_over_transformers']:.3f}, cache {ratio['cache_over_transformers']:.3f}"
        )
