#!/usr/bin/env python
"""Benchmark data loading: throughput, first-batch latency, recovery from a killed worker, worker memory.

python scripts/bench_loader.py --workers 1 2           # 1024 x 768 JPEG and PNG, made on the fly, tiles of 336 pixels
PYTHONPATH=/another/checkout python -P scripts/bench_loader.py  # another checkout (--cache reuses the images)
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from PIL import Image, ImageFilter

SIZE = (1024, 768)
PREFETCH = 4
AFTER = 4  # batches to wait for after killing a worker
SETTINGS: dict[str, Any] = {
    "run": {"name": "bench", "seed": 0},
    "model": {
        "config": {
            "text_config": {
                "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8,
                "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400, "max_position_embeddings": 32768,
            },
            "vision_config": {
                "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 2, "image_size": 336, "patch_size": 14,
            },
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
            "image_seq_length": 576,
        },
        "dtype": "float32",
        "train": {"projector": 1e-2},
    },
    "data": {
        "train": [{"path": "train.json", "images": "."}], "eval": [], "system": "", "max_length": 8192,
        "max_tokens": 12288, "max_bad": 0, "workers": 1,
    },
    "pruning": {"method": "pyramiddrop", "layers": [2, 4, 6], "keep": [0.5, 0.25, 0.125]},
    "train": {"global_batch_size": 4, "epochs": 1000},
    "deepspeed": "configs/deepspeed/zero2.json",
}  # fmt: skip


def write_images(folder: Path, count: int) -> None:
    """Write smooth-noise images with photo-like file sizes; every fourth is a PNG."""
    rng, records = np.random.default_rng(0), []
    for number in range(count):
        name = f"{number}.{'png' if number % 4 == 3 else 'jpg'}"
        noise = Image.fromarray(rng.integers(0, 255, (SIZE[1] // 8, SIZE[0] // 8, 3), dtype=np.uint8))
        noise.resize(SIZE, Image.Resampling.BICUBIC).filter(ImageFilter.DETAIL).save(folder / name)
        turns = [{"from": "human", "value": f"<image>\nwhat is {number}?"}, {"from": "gpt", "value": f"it is {number}"}]
        records.append({"id": str(number), "image": name, "conversations": turns})
    (folder / "train.json").write_text(json.dumps(records))


class Loaders:
    """Creates data loaders for the same steps."""

    def __init__(self, folder: Path, steps: int):
        # imported here because workers import this file
        from vtprune_train.config.load import load_config
        from vtprune_train.training.loop.data import build_collator, build_planner
        from vtprune_train.training.loop.parts import build_parts, training_cost

        (folder / "bench.yaml").write_text(yaml.safe_dump(SETTINGS))
        overrides = [f"run.output_dir={folder / 'runs'}", f"data.root={folder}", f"data.cache_dir={folder / 'cache'}"]
        config = load_config(str(folder / "bench.yaml"), overrides)
        parts = build_parts(config)
        cost = training_cost(config, parts.model.config)
        self.collate = build_collator(config, parts, cost, config.pruning.build(), "train")
        self.planner, self.steps = build_planner(config, self.collate, 1), steps

    def make(self, workers: int) -> Any:
        from vtprune_train.data.load.loader import StepLoader

        options: dict[str, Any] = {"rank": 0, "device": torch.device("cpu"), "prefetch": PREFETCH, "timeout": 120}
        return StepLoader(self.collate, self.planner, first_step=0, end_step=self.steps, workers=workers, **options)


def worker_processes() -> list[psutil.Process]:
    """Leaf child processes (excludes the fork server)."""
    below = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    helpers = {process.ppid() for process in below}
    return [p for p in below if p.pid not in helpers and "resource_tracker" not in " ".join(p.cmdline())]


def cpu_seconds() -> float:
    """CPU seconds of this process and its workers; more reliable than wall time on shared cores."""
    return sum(sum(process.cpu_times()[:2]) for process in (psutil.Process(), *worker_processes()))


def measure(loaders: Loaders, workers: int) -> dict[str, Any]:
    began = time.perf_counter()
    steps: Any = iter(loaders.make(workers))
    next(steps)
    first = time.perf_counter() - began
    began, used, batches, images = time.perf_counter(), cpu_seconds(), 0, 0
    for _ in range(loaders.steps - 1):
        made = next(steps)[1]
        batches += len(made)
        images += sum(len(batch.sample_ids) for batch in made)
    seconds, used = time.perf_counter() - began, cpu_seconds() - used
    result = {
        "first_batch_s": first,
        "batches_per_s": batches / seconds,
        "images_per_s": images / seconds,
        "images_per_cpu_s": images / used,
    }
    if workers:
        result["worker_uss_mb"] = max(process.memory_full_info().uss >> 20 for process in worker_processes())
    steps.close()
    return {**result, **killed(loaders, workers)} if workers else result


def killed(loaders: Loaders, workers: int) -> dict[str, Any]:
    """Kill a worker while all workers are idle. Returns the extra time for the prefetched and the next ``AFTER``
    batches, and the longest wait for a batch."""
    took: dict[bool, tuple[float, float]] = {}
    for kill in (False, True):
        steps: Any = iter(loaders.make(workers))
        next(steps)
        while any(process.cpu_percent(0.5) > 1 for process in worker_processes()):
            time.sleep(0.1)
        if kill:
            os.kill(worker_processes()[0].pid, signal.SIGKILL)
        times = [time.perf_counter()]
        for _ in range(workers * PREFETCH + AFTER):
            next(steps)
            times.append(time.perf_counter())
        took[kill] = times[-1] - times[0], float(np.diff(times).max())
        steps.close()
    return {"killed_s": took[True][0] - took[False][0], "killed_longest_wait_s": took[True][1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cache", type=Path, help="folder for images and index (not deleted)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.cache or Path(temporary)
        folder.mkdir(exist_ok=True)
        if not (folder / "train.json").exists():
            write_images(folder, arguments.images)
        loaders = Loaders(folder, arguments.steps)
        for workers in arguments.workers:
            results = [measure(loaders, workers) for _ in range(arguments.repeat)]
            for name in results[0]:
                values = [round(result[name], 2) for result in results]
                print(f"{workers} workers, {name}: median {statistics.median(values):g} of {values}", flush=True)


if __name__ == "__main__":
    main()
