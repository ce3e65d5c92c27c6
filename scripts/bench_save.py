"""The saving suite of ``bench.py``: how long a checkpoint holds the loop, written at once and in the background.

The loop's own pieces on one rank: a LLaVA-NeXT of about 110 million parameters in float32, AdamW, DeepSpeed. Saves of
both kinds take turns; while the thread writes, training steps go on and are timed against undisturbed ones.
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
    """Writes nothing: tokenizers are small and of no interest here."""

    def save_pretrained(self, folder: Any) -> None:
        del folder


def run(model: HFModule, batch: PackedBatch, repeats: int, stage: int, folder: Path | None) -> dict[str, Any]:
    """Measure ``repeats`` saves of each kind.

    Args:
        model: pruned, float32.
        batch: what a step trains on.
        repeats: saves of each kind; one more of each comes first and is not counted.
        stage: ZeRO's.
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
            found = {"step": [step() for _ in range(2)]}
            for name, checkpoints in kinds.items():
                found |= measure(engine, checkpoints, name, repeat, step)
            if repeat:  # the first one allocates
                for name, values in found.items():
                    seconds[name] += values
        newest = kinds["background"].steps()[-1]
        size = sum(entry["size"] for entry in manifest.read_manifest(newest).values())
    return make_report(seconds, sum(p.numel() for p in model.parameters()), size, stage)


def measure(
    engine: Any, checkpoints: CheckpointFolder, name: str, number: int, step: Callable[[], float]
) -> dict[str, list[float]]:
    """One save: how long the loop stood still, and the steps that were made while a thread was writing."""
    began = time.perf_counter()
    checkpoints.save(engine, NoProcessor(), TrainerState(step=number + 1), "")
    found = {name: [time.perf_counter() - began]}
    if name == "background":
        steps = []
        while any(thread.name == "checkpoint" for thread in threading.enumerate()):
            steps.append(step())
        found |= {"step_while_writing": steps, "writing": [time.perf_counter() - began]}
        checkpoints.wait()
    return found


def make_report(seconds: dict[str, list[float]], parameters: int, size: int, stage: int) -> dict[str, Any]:
    rows = {
        name: {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values), "count": len(values)}
        for name, values in seconds.items()
    }
    at_once, background = rows["at_once"]["median_s"], rows["background"]["median_s"]
    slower = rows["step_while_writing"]["median_s"] / rows["step"]["median_s"]
    ratios = {"stall": background / at_once, "step_while_writing": slower}
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
