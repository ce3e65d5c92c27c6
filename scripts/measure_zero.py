#!/usr/bin/env python
"""Measure the memory of weights, gradients and optimizer states under each ZeRO stage, in bytes per trained parameter
at the peak of the backward pass and of the optimizer step on CPU ranks, and compare it with the prediction of
``training/memory``.

    python scripts/measure_zero.py [--ranks 1] [--dtype bfloat16] [--stages 0,1,2,3] [--json FILE]

The model is a stack of linear layers with a single input row, so activations are negligible. Buckets are as large
relative to the model as 2e8 elements are to 7e9 parameters. Each configuration runs in separate processes.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vtprune_train.config.train import TrainConfig
from vtprune_train.training.memory.predict import Parameters, States, Zero
from vtprune_train.training.memory.track import track_allocations

WIDTH, LAYERS = 192, 48


class Stack(torch.nn.Module):
    """Linear layers with residual connections; the loss is a sum of squares."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.float().square().mean()


def num_parameters() -> int:
    return LAYERS * (WIDTH * WIDTH + WIDTH)


def settings_of(stage: int, dtype: str, accumulation: str | None) -> dict[str, Any]:
    """DeepSpeed config with bucket sizes proportional to the model."""
    bucket = num_parameters() // 35
    zero: dict[str, Any] = {"stage": stage}
    if stage in (1, 2):
        zero |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket - bucket % 2, "overlap_comm": True,
                 "contiguous_gradients": True}  # fmt: skip
    if stage == 3:
        zero |= {"reduce_bucket_size": bucket, "stage3_param_persistence_threshold": 0,
                 "stage3_prefetch_bucket_size": bucket, "contiguous_gradients": True}  # fmt: skip
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 2**62,
        "zero_force_ds_cpu_optimizer": False,
    }
    if accumulation is not None:
        config["data_types"] = {"grad_accum_dtype": accumulation}
    return config


def measure(rank: int, ranks: int, port: int, configs: list[dict[str, Any]], dtype: str, out: str) -> None:
    """Two steps of two micro-batches under each config; rank 0 writes bytes per trained parameter."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}  # fmt: skip
    torch.set_num_threads(1)
    from vtprune_train.training.engine.start import start_distributed

    start_distributed(60)
    results = [_measure(settings, dtype, ranks) for settings in configs]
    if rank == 0:
        Path(out).write_text(json.dumps(results))


def _measure(settings: dict[str, Any], dtype: str, ranks: int) -> dict[str, Any]:
    import deepspeed

    torch.manual_seed(0)
    device, kind, parameters = torch.device("cpu"), getattr(torch, dtype), num_parameters()
    with track_allocations(device) as memory:
        before = memory.start
        model = Stack().to(kind)
        groups = [
            {"params": [p for p in model.parameters() if (p.ndim > 1) is with_weight_decay]}
            for with_weight_decay in (True, False)
        ]
        flat = settings["zero_optimization"]["stage"] > 0
        counted = Parameters.of(groups, list(model.parameters()), TrainConfig(), flat)
        optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
        for _step in range(2):
            for micro in range(2):
                x = torch.randn(1, WIDTH, dtype=kind)
                with memory.phase("backward"):
                    engine.set_gradient_accumulation_boundary(micro == 1)
                    engine.backward(engine(x), scale_wrt_gas=False)
                if micro == 1:
                    with memory.phase("step"):
                        engine.step()
                else:
                    engine.step()
        name = type(engine.optimizer).__name__
        engine.destroy()
    states = States.of(Zero.of(settings, dtype, ranks), counted)
    return {
        "stage": settings["zero_optimization"]["stage"],
        "accumulation": settings.get("data_types", {}).get("grad_accum_dtype", dtype),
        "optimizer": name,
        "backward": (memory.peaks["backward"] - before) / parameters,
        "step": (memory.peaks["step"] - before) / parameters,
        "predicted_backward": states.backward / parameters,
        "predicted_step": states.stepping / parameters,
    }


def run(ranks: int, dtype: str, stages: Sequence[int]) -> list[dict[str, Any]]:
    """Measure each stage with gradients accumulated in the model's dtype and, for half precision, in float32."""
    configs = [
        settings_of(stage, dtype, accumulation)
        for stage in stages
        for accumulation in ((None, "fp32") if stage and dtype != "float32" else (None,))
    ]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/found.json"
        mp.start_processes(measure, (ranks, port, configs, dtype, out), nprocs=ranks, start_method="spawn")
        return json.loads(Path(out).read_text())  # type: ignore[no-any-return]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--stages", default="0,1,2,3")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    rows = run(arguments.ranks, arguments.dtype, [int(stage) for stage in arguments.stages.split(",")])
    print(f"bytes per trained parameter on each of {arguments.ranks} rank(s), {arguments.dtype} weights; (predicted)")
    print(f"{'ZeRO':>4} {'accumulation':<13}{'backward':>9}{'':>9}{'step':>9}")
    for row in rows:
        print(
            f"{row['stage']:>4} {row['accumulation']:<13}{row['backward']:>9.2f} ({row['predicted_backward']:.2f})"
            f"{row['step']:>9.2f} ({row['predicted_step']:.2f})  {row['optimizer']}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
