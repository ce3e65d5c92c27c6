"""Measures the steps of a trainer inside its process, in the same way for every row."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

import bench_rows


class Recorder:
    """Times between the ends of optimizer steps, losses and tokens of the steps, and the peak memory of training."""

    def __init__(self, device: torch.device):
        self.device = device
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[float] = []
        self.flops: list[float] = []

    def start(self) -> None:
        """Called before the first step, after the model is built."""
        bench_rows.reset_peak(self.device)
        self._mark()

    def step(self) -> None:
        """Called at the end of every optimizer step."""
        self._mark()

    def _mark(self) -> None:
        bench_rows.synchronize(self.device)
        self.ends.append(time.perf_counter())

    def write(self, path: Path, settings: dict[str, Any], peak_flops: float | None = None) -> None:
        seconds = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]
        result = {
            "seconds": seconds,
            "losses": self.losses,
            "tokens": self.tokens,
            "flops": self.flops,
            "peak_memory_bytes": bench_rows.peak_memory(self.device),
            "peak_flops": peak_flops,
            "settings": settings,
        }
        path.write_text(json.dumps(result))
