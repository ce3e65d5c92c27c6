"""Checks the training loop, ``train.py`` in a separate process: resume, ZeRO stages, and speed on real tiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gpu_checks.common import ROOT, Check
from vtprune_train.data.synthetic import write_dataset


@dataclass
class Loop:
    """Runs ``train.py`` on one device; a run's log goes to ``out``."""

    device: torch.device
    folder: Path
    out: Path

    def run(self, name: str, *arguments: str, timeout: float = 150) -> dict[str, Any]:
        """Duration of a run in seconds, and its metrics: a list over steps for each key.

        Raises:
            RuntimeError: the run failed.
        """
        command = [sys.executable, "train.py", *arguments, f"run.output_dir={self.folder}", f"run.name={name}"]
        environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
        if self.device.type != "cuda":
            environment["DS_ACCELERATOR"] = "cpu"
        began = time.time()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / f"train_{name}.log").write_text(done.stdout[-20000:] + done.stderr[-40000:])
        if done.returncode:
            raise RuntimeError(f"train.py, run {name}, ended with {done.returncode}: {done.stderr[-1500:]}")
        rows = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        return {"seconds": time.time() - began, "metrics": {key: [row.get(key) for row in rows] for key in rows[0]}}

    def resumed_equals_whole(self, *settings: str, half: int, whole: int) -> dict[str, Any]:
        """The losses of a run to step ``whole``, and of one that stops at ``half`` and is resumed."""
        once = self.run("whole", *settings, f"run.stop_after={whole}")
        self.run("half", *settings, f"run.stop_after={half}")
        resumed = self.run("half", *settings, f"run.stop_after={whole}")
        losses = [result["metrics"]["loss"] for result in (once, resumed)]
        return {
            "losses": losses,
            "equal": losses[0] == losses[1],
            "seconds": once["seconds"],
            "step_time": once["metrics"]["step_time"],
            "peak_memory_bytes": once["metrics"]["peak_memory_bytes"],
        }

    def quickstart(self, records: int, steps_between_saves: int) -> list[str]:
        """Arguments of the quickstart in bf16 on ``records`` drawn images."""
        data = self.folder / "data"
        if not data.exists():
            write_dataset(data, num_train=records, num_eval=8, seed=0)
        return [
            "--config", "configs/quickstart.yaml", f"data.root={data}", f"data.cache_dir={self.folder / 'cache'}",
            "data.eval=[]", "data.max_tokens=2048", "model.dtype=bfloat16", f"train.save_every={steps_between_saves}",
            "train.compile=never",  # each process would compile for longer than it trains
        ]  # fmt: skip

    def deepspeed(self, stage: int, accumulation: str) -> str:
        """Settings of the ZeRO stage and of the dtype for gradient accumulation."""
        path = self.folder / f"zero{stage}_{accumulation}.json"
        zero = {"stage": stage, "contiguous_gradients": True, "overlap_comm": True}
        path.write_text(json.dumps({"zero_optimization": zero, "data_types": {"grad_accum_dtype": accumulation}}))
        return f"deepspeed={path}"


def train(check: Check) -> None:
    """Quickstart in bf16 and ZeRO-2, whole and resumed; on a GPU also accumulation in float32 and ZeRO-3."""
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(check.device, Path(folder), check.out)
        if not check.on_cuda:
            settings = [*loop.quickstart(24, 1), "train.global_batch_size=8"]
            check.report.put("train", resume=loop.resumed_equals_whole(*settings, half=1, whole=2))
            return
        settings = [*loop.quickstart(400, 6), "data.workers=4"]
        check.report.put("train", resume=loop.resumed_equals_whole(*settings, half=6, whole=12))
        short = [*settings, "run.stop_after=6"]
        zero3 = "deepspeed=configs/deepspeed/zero3.json"
        for name, engine in {"fp32_accumulation": loop.deepspeed(2, "fp32"), "zero3": zero3}.items():
            with check.noting_failure("train", name):
                check.report.put("train", **{name: loop.run(name, *short, engine)})


def train_large(check: Check) -> None:
    """Training steps on real tiles with workers, dense and pruned: MFU and the share of time spent waiting for data."""
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(check.device, Path(folder), check.out)
        big = check.geometry_name == "7b"
        _write_images(loop.folder, 160 if big else 8)
        for name in ("pyramiddrop", "none") if big else ("pyramiddrop",):
            settings = {**_large_settings(loop.folder, big), "pruning": _pruning(name, big)}
            (loop.folder / f"{name}.yaml").write_text(json.dumps(settings))
            arguments = ("--config", str(loop.folder / f"{name}.yaml"), loop.deepspeed(2, "fp32"))
            check.report.put("train_large", **{name: loop.run(f"large_{name}", *arguments)})


def _write_images(folder: Path, count: int) -> None:
    """``count`` images of five sizes with a question and an answer each, as ``train.json`` and ``images``."""
    rng, records = np.random.default_rng(0), []
    (folder / "images").mkdir()
    for number in range(count):
        height, width = [(480, 640), (640, 480), (336, 672), (500, 667), (200, 640)][number % 5]
        blocks = rng.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8)
        image = Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / "images" / f"{number}.jpg", quality=90)
        words = " ".join(f"word{rng.integers(50)}" for _ in range(60))
        turns = [{"from": "human", "value": f"<image>\nwhat is shown {words[:80]}?"}, {"from": "gpt", "value": words}]
        records.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(records))


def _pruning(method: str, big: bool) -> dict[str, Any]:
    if method == "none":
        return {"method": method}
    return {"method": method, "layers": [3, 6, 9] if big else [1, 2, 3], "keep": [0.5, 0.25, 0.125]}


def _large_settings(folder: Path, big: bool) -> dict[str, Any]:
    """Sizes: 12 decoder layers of width 2048 with CLIP-L/336 and batches of 16,384 tokens; or two layers of each."""
    tile, heads = (336, 16) if big else (56, 2)
    text = {
        "model_type": "llama", "hidden_size": 2048 if big else 64, "intermediate_size": 5504 if big else 172,
        "num_hidden_layers": 12 if big else 4, "num_attention_heads": heads, "num_key_value_heads": heads,
        "vocab_size": 1024, "max_position_embeddings": 4096,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 1024 if big else 64, "image_size": tile, "patch_size": 14,
        "intermediate_size": 4096 if big else 128, "num_hidden_layers": 24 if big else 2, "num_attention_heads": heads,
    }  # fmt: skip
    pinpoints = [[tile, 2 * tile], [2 * tile, tile], [2 * tile, 2 * tile], [3 * tile, tile], [tile, 3 * tile]]
    sizes = {
        "text_config": text, "vision_config": vision, "image_seq_length": (tile // 14) ** 2,
        "image_grid_pinpoints": pinpoints,
    }  # fmt: skip
    rates = {"projector": 1e-4, "language_model": 1e-4, "vision_tower": 1e-5}
    return {
        "model": {"config": sizes, "dtype": "bfloat16", "train": rates},
        "data": {
            "root": str(folder), "train": [{"path": "train.json", "images": "images"}], "template": "vicuna_v1",
            "max_length": 4096, "max_tokens": 16384 if big else 4096, "workers": 8 if big else 1,
            "cache_dir": str(folder / "cache"),
        },
        # Compiling would take longer than the steps.
        "train": {
            "global_batch_size": 28 if big else 4, "max_steps": 8 if big else 2, "save_every": 1000, "compile": "never",
        },
    }  # fmt: skip
