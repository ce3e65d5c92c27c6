"""Compare the size of PLPHP's cache and the decoding step time with the dense cache.

    python scripts/bench_cache.py --out cache.json

A decoder made from a config (random weights, no tower) is filled with prompts of 100 text tokens and images, and
decodes on both caches in turn: some steps of one, as many of the other, in changing order. With random weights all
layers would fall into one class, so the thresholds are set to put every pruned layer into the middle class (keep 0.4).
A batch repeats the cache of one prompt. Decoding cost is the same as with different prompts; prefill cost is not
measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaModel

from vtprune_train.bench.decoder_time import make_decoder
from vtprune_train.core.flops import DecoderGeometry
from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.models.cache import cache_bytes
from vtprune_train.models.forward.padded import decode, prefill
from vtprune_train.pruning.methods.plphp import PLPHP

TEXT = 100  # text tokens before, between and after the images
IMAGE = 2900  # a five-tile LLaVA-NeXT image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=_numbers, default=[3000, 12000], help="tokens of a prompt, comma-separated")
    parser.add_argument("--batches", type=_numbers, default=[1, 16])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument(
        "--hidden", type=int, default=512, help="hidden size (head size 64; half as many key-value heads)"
    )
    parser.add_argument("--steps", type=int, default=4, help="decoding steps per repeat")
    parser.add_argument("--repeats", type=int, default=9, help="repeats per cache, after one warm-up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    width = options.hidden
    sizes = DecoderGeometry(options.layers, width, width * 11 // 4, width // 64, width // 128, 64, vocab=8)
    model = make_decoder(sizes, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    rows = []
    for context in options.contexts:
        filled, seconds = fill(model, context)
        for batch in options.batches:
            rows.append(measure(model, filled, context, batch, options.steps, options.repeats) | seconds)
            print_row(rows[-1], header=len(rows) == 1)
    result = {
        "settings": {**vars(options), "out": None, "torch": torch.__version__, "parameters": _parameters(model)},
        "rows": rows,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def middle_class() -> PLPHP:
    """PLPHP settings that use the published keep ratio in every pruned layer."""
    return PLPHP(alpha=2.0, beta=0.0)


@torch.no_grad()
def fill(model: LlamaModel, context: int) -> tuple[dict[str, DynamicCache], dict[str, float]]:
    """Prefill a dense and a pruned cache; return caches and prefill times."""
    images = max(1, round(context / (IMAGE + TEXT)))
    each, text = (context - TEXT) // images, TEXT // (images + 1)
    spans = tuple(ImageSpan(text + index * (each + text), each) for index in range(images))
    segment = SegmentLayout(context, spans, (context - 1,))
    embeds = torch.randn(context, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    embeds = embeds.to(model.device, model.dtype)
    caches, seconds = {}, {}
    method: PLPHP | None
    for name, method in (("dense", None), ("plphp", middle_class())):
        wait(model)
        began = time.perf_counter()
        _, _, caches[name] = prefill(model, method, embeds, [segment])
        wait(model)
        seconds[f"{name}_prefill_s"] = time.perf_counter() - began
    return caches, seconds


@torch.no_grad()
def measure(
    model: LlamaModel, filled: dict[str, DynamicCache], context: int, batch: int, steps: int, repeats: int
) -> dict[str, Any]:
    """Cache sizes and median step times, and the median ratio of adjacent measurements."""
    caches = {name: copy.deepcopy(cache) for name, cache in filled.items()}
    size = {name: cache_bytes(cache) * batch for name, cache in caches.items()}
    for cache in caches.values():
        if batch > 1:
            cache.batch_repeat_interleave(batch)
    methods = {"dense": None, "plphp": middle_class()}
    token = torch.randn(batch, 1, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    token = token.to(model.device, model.dtype)

    seconds: dict[str, list[float]] = {name: [] for name in caches}
    for repeat in range(repeats + 1):
        for name in sorted(caches, reverse=repeat % 2 == 0):
            wait(model)
            began = time.perf_counter()
            for _ in range(steps):
                decode(model, methods[name], token, caches[name])
            wait(model)
            if repeat:
                seconds[name].append((time.perf_counter() - began) / steps)
    quotients = [ours / theirs for ours, theirs in zip(seconds["plphp"], seconds["dense"], strict=True)]
    return {
        "context": context,
        "batch": batch,
        **{f"{name}_cache_bytes": size[name] for name in caches},
        **{f"{name}_step_s": statistics.median(seconds[name]) for name in caches},
        "cache_ratio": size["plphp"] / size["dense"],
        "step_ratio": statistics.median(quotients),
        "step_ratio_range": [min(quotients), max(quotients)],
    }


def wait(model: LlamaModel) -> None:
    """Synchronize the device."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def print_row(row: dict[str, Any], header: bool) -> None:
    if header:
        print(
            f"{'context':>8}{'batch':>6}{'dense MB':>10}{'plphp MB':>10}{'ratio':>7}{'dense ms':>10}{'plphp ms':>10}"
            f"{'ratio':>7}{'from':>7}{'to':>7}"
        )
    low, high = row["step_ratio_range"]
    print(
        f"{row['context']:>8}{row['batch']:>6}{row['dense_cache_bytes'] / 1e6:>10.1f}"
        f"{row['plphp_cache_bytes'] / 1e6:>10.1f}{row['cache_ratio']:>7.3f}{row['dense_step_s'] * 1e3:>10.1f}"
        f"{row['plphp_step_s'] * 1e3:>10.1f}{row['step_ratio']:>7.3f}{low:>7.3f}{high:>7.3f}",
        flush=True,
    )


def _parameters(model: LlamaModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
