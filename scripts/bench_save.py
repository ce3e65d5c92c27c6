"""The saving suite of ``bench.py``: how long synchronous and background saves block training.

Uses the training loop's components on one rank: a LLaVA-NeXT of about 110 million parameters in float32, AdamW,
DeepSpeed. Both kinds of saves alternate. Step times during a background save are compared with normal step times.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from vtprune_train.config.train import TrainConfig
from vtprune_train.core.stream import PackedBatch
from vtprune_train.models import HFModule
from vtprune_train.training.checkpoint import manifest
from vtprune_train.training.checkpoint.folder import CheckpointFolder, TrainerState
from vtprune_train.training.engine.start import start_distributed, start_engine
from vtprune_train.training.optimizer import OptimizerSpec


class NoProcessor:
    """Dummy processor; tokenizers are too small to matter."""

    def save_pretrained(self, folder: Any) -> None:
        del folder


def run(model: HFModule, batch: PackedBatch, repeats: int, stage: int, folder: Path | None) -> dict[str, Any]:
    """Measure ``repeats`` saves of each kind.

    Args:
        model: pruned, float32.
        batch: training batch.
        repeats: saves of each kind, after one warm-up.
        stage: ZeRO stage.
        folder: where checkpoints go; ``None``: a temporary folder.
    """
    disable_progress_bar()
    device = start_distributed(1800)
    groups = [{"params": list(model.parameters()), "lr": 1e-6}]
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
    }
    engine = start_engine(model, groups, OptimizerSpec.of(TrainConfig()), settings)

    def step() -> float:
        began = time.perf_counter()
        engine.backward(engine(batch.to(device)).loss_sum / len(batch.targets))
        engine.step()
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory(dir=folder) as where:
        kinds = {
            name: CheckpointFolder(Path(where) / name, 1, name == "background") for name in ("at_once", "background")
        }
        seconds: dict[str, list[float]] = {
            "at_once": [],
            "background": [],
            "step": [],
            "step_while_writing": [],
            "writing": [],
        }
        for repeat in range(repeats + 1):
            times = {"step": [step() for _ in range(2)]}
            for name, checkpoints in kinds.items():
                times |= measure(engine, checkpoints, name, repeat, step)
            if repeat:  # the first one allocates
                for name, values in times.items():
                    seconds[name] += values
        newest = kinds["background"].steps()[-1]
        size = sum(entry["size"] for entry in manifest.read_manifest(newest).values())
    return make_report(seconds, sum(p.numel() for p in model.parameters()), size, stage)


def measure(
    engine: Any, checkpoints: CheckpointFolder, name: str, number: int, step: Callable[[], float]
) -> dict[str, list[float]]:
    """Time one save: how long training was blocked, and step times during the write."""
    began = time.perf_counter()
    checkpoints.save(engine, NoProcessor(), TrainerState(step=number + 1), "")
    times = {name: [time.perf_counter() - began]}
    if name == "background":
        steps = []
        while any(thread.name == "checkpoint" for thread in threading.enumerate()):
            steps.append(step())
        times |= {"step_while_writing": steps, "writing": [time.perf_counter() - began]}
        checkpoints.wait()
    return times


def make_report(seconds: dict[str, list[float]], parameters: int, size: int, stage: int) -> dict[str, Any]:
    rows = {
        name: {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values), "count": len(values)}
        for name, values in seconds.items()
    }
    synchronous, background = rows["at_once"]["median_s"], rows["background"]["median_s"]
    slower = rows["step_while_writing"]["median_s"] / rows["step"]["median_s"]
    ratios = {"stall": background / synchronous, "step_while_writing": slower}
    return {"parameters": parameters, "checkpoint_bytes": size, "zero_stage": stage, "rows": rows, "ratios": ratios}


def print_report(report: dict[str, Any]) -> None:
    print(
        f"{report['parameters'] / 1e6:.1f} M parameters, ZeRO {report['zero_stage']}, "
        f"{report['checkpoint_bytes'] / 1e9:.2f} GB a checkpoint\n"
    )
    print(f"{'':24}{'median s':>9}{'min':>8}{'max':>8}{'count':>7}")
    for name, row in report["rows"].items():
        print(f"{name:24}{row['median_s']:>9.3f}{row['min_s']:>8.3f}{row['max_s']:>8.3f}{row['count']:>7}")
    print(f"\nstall of the loop: {report['ratios']['stall']:.1%} of a save at once")
    print(f"a step while a thread writes takes {report['ratios']['step_while_writing']:.2f} of one that is undisturbed")
