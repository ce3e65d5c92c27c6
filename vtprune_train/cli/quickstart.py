"""``vtprune quickstart``: draw data, train a tiny model with PyramidDrop on two CPU ranks, evaluate, print a table."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtprune_train.config.errors import ConfigError
from vtprune_train.config.load import load_config
from vtprune_train.data import synthetic_text, synthetic_videos
from vtprune_train.data.synthetic import write_dataset

DATA = Path("runs/data/quickstart")  # data.root of the recipe
RECIPE = "quickstart.yaml"
NUM_TRAIN, NUM_EVAL = 6000, 500
SIDES = {"dense": ["pruning.method=none"], "pyramiddrop": []}  # of --compare


@dataclass(frozen=True)
class Task:
    """What the command trains on.

    Args:
        recipe: file in ``configs/``.
        data: the recipe's ``data.root``.
        write: writes the data set to ``data``.
        compare: folder of the runs of ``--compare``.
    """

    recipe: str
    data: Path
    write: Callable[..., None]
    compare: Path

    @property
    def name(self) -> str:
        """The recipe's ``run.name``."""
        return Path(self.recipe).stem


IMAGES = Task(RECIPE, DATA, write_dataset, Path("runs/compare"))
VIDEOS = Task(
    "quickstart_video.yaml",
    Path("runs/data/quickstart_video"),
    synthetic_videos.write_dataset,
    Path("runs/compare_video"),
)

TEXT = Task(
    "quickstart_text.yaml", Path("runs/data/quickstart_text"), synthetic_text.write_dataset, Path("runs/compare_text")
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--compare", action="store_true", help="train PyramidDrop and dense on the same data and steps")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--video", action="store_true", help="train on videos, with questions about what happens in them")
    data.add_argument("--text", action="store_true", help="train on images in which a word must be read")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes that train (default: 2)")
    parser.add_argument(
        "--restart", action="store_true", help="delete the earlier run and train from scratch (default: continue it)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the runs")


def run(arguments: argparse.Namespace) -> int:
    """Train, print the table, write ``result.json``. Continues an earlier run unless ``--restart``.

    Raises:
        ConfigError: the overrides are wrong, or the table cannot be made with them.
    """
    task = VIDEOS if arguments.video else TEXT if arguments.text else IMAGES
    check_overrides(task, arguments.overrides)
    task.write(task.data, num_train=NUM_TRAIN, num_eval=NUM_EVAL, seed=7)
    run_folder = empty_folder if arguments.restart else existing_folder
    if arguments.compare:
        return compare(task, arguments.overrides, {name: run_folder(task.compare / name) for name in SIDES})
    return train(task, arguments.overrides, arguments.ranks, run_folder(Path("runs") / task.name))


def check_overrides(task: Task, overrides: list[str]) -> None:
    """Check that the overrides are valid and leave what the table needs."""
    config = load_config(task.recipe, overrides)
    needed = {"run.name": task.name, "run.output_dir": "runs", "run.stop_after": None, "train.eval_shuffled": True}
    values: dict[str, Any] = {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in needed}
    wrong = [f"{key}={values[key]}" for key in needed if values[key] != needed[key]]
    if wrong or not config.data.eval:
        raise ConfigError(
            f"vtprune quickstart cannot make its table with {', '.join(wrong or ['data.eval=[]'])}; leave it out, or "
            f"use vtprune launch --config {task.recipe}, which takes all settings"
        )


def train(task: Task, overrides: list[str], ranks: int, run_dir: Path) -> int:
    """One run, with PyramidDrop, in ``run_dir``."""
    if code := finish([start(run_dir, overrides, ranks, recipe=task.recipe)]):
        return code
    result = summarize(run_dir)
    print_table({"pyramiddrop": result})
    write_json(run_dir / "result.json", result)
    return 0


def compare(task: Task, overrides: list[str], folders: dict[str, Path]) -> int:
    """PyramidDrop and dense side by side, one process each, in ``folders``, which lie in one folder."""
    # At the same time, each on half of the cores, so that other load on the machine slows both equally.
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    sides = {name: [*SIDES[name], *overrides] for name in folders}
    if code := finish([start(folders[name], sides[name], 1, threads, task.recipe) for name in folders]):
        return code
    results = {name: summarize(run_dir) for name, run_dir in folders.items()}
    print_table(results)
    time_ratio, flop_ratio = (results["pyramiddrop"][key] / results["dense"][key] for key in ("train_seconds", "flops"))
    print(f"time ratio {time_ratio:.3f}, FLOP ratio {flop_ratio:.3f}, quotient {time_ratio / flop_ratio:.3f}")
    folder = folders["dense"].parent
    write_json(folder / "result.json", {**results, "time_ratio": time_ratio, "flop_ratio": flop_ratio})
    plot_comparison(folders, results, folder / "compare.png")
    return 0


def existing_folder(run_dir: Path) -> Path:
    """Create the folder; if it has a run, say that it continues."""
    if (run_dir / "checkpoints").exists():
        print(f"{run_dir} has a run, which continues if it is not finished; --restart deletes it")
    run_dir.mkdir(parents=True, exist_ok=True)
    return run_dir


def empty_folder(run_dir: Path) -> Path:
    """Create the folder; delete it first if it exists."""
    if run_dir.exists():
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True)
    return run_dir


def start(
    run_dir: Path, overrides: list[str], ranks: int, threads: int | None = None, recipe: str = RECIPE
) -> subprocess.Popen[bytes]:
    """Start ``vtprune launch`` in a new process, on CPUs, with ``threads`` in each rank (default: OMP_NUM_THREADS, or
    cores divided by ranks)."""
    settings = [f"run.output_dir={run_dir.parent}", f"run.name={run_dir.name}", *overrides]
    arguments = ["launch", "--nproc_per_node", str(ranks), "--config", recipe, *settings]
    default = os.environ.get("OMP_NUM_THREADS", max(1, len(os.sched_getaffinity(0)) // ranks))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads or default)}
    print(f"$ vtprune {' '.join(arguments)}", flush=True)
    return subprocess.Popen([sys.executable, "-m", "vtprune_train.cli", *arguments], env=environment)


def finish(processes: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all processes; returns the exit code of the first one that failed, or 0."""
    try:
        codes = [process.wait() for process in processes]
    except KeyboardInterrupt:  # the processes got the signal too; wait until they have saved
        codes = [process.wait() for process in processes]
    return next((code for code in codes if code), 0)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def summarize(run_dir: Path) -> dict[str, Any]:
    """Accuracy of a run on held-out data, seconds in steps, FLOPs, tokens in each stage.

    Raises:
        ConfigError: the run was finished earlier, by another command, without evaluation or without shuffled data.
    """
    steps = read_lines(run_dir / "metrics.jsonl")
    held_out = (read_lines(run_dir / "eval.jsonl") or [{}])[-1]
    if "exact_match_shuffled" not in held_out:
        raise ConfigError(f"{run_dir} is finished, but was not evaluated as the table needs; --restart trains again")
    stages = sorted(key for key in steps[0] if key.startswith("tokens_stage_"))
    samples = sum(step["samples"] for step in steps)
    return {
        "exact_match": held_out["exact_match"],
        "exact_match_shuffled": held_out["exact_match_shuffled"],
        "train_seconds": sum(step["step_time"] for step in steps),
        "steps": len(steps),
        "flops": sum(step["flops"] for step in steps),
        "flops_dense": sum(step["flops_dense"] for step in steps),
        "tokens_per_stage": [sum(step[stage] for step in steps) / samples for stage in stages],
    }


def print_table(results: dict[str, dict[str, Any]]) -> None:
    columns = f"{'exact match':>12}{'shuffled':>10}{'steps':>7}{'seconds':>9}{'TFLOP':>8}"
    print(f"\n{'':14}{columns}  tokens per sample, by stage")
    for name, result in results.items():
        tokens = " / ".join(f"{count:.0f}" for count in result["tokens_per_stage"])
        print(
            f"{name:14}{result['exact_match']:>11.1%}{result['exact_match_shuffled']:>10.1%}{result['steps']:>7}"
            f"{result['train_seconds']:>9.0f}{result['flops'] / 1e12:>8.1f}  {tokens}"
        )
    print("shuffled: exact match with images or videos exchanged between samples, so without seeing the right one\n")


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
    print(f"wrote {path}")


def plot_comparison(folders: dict[str, Path], results: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot loss over time, and accuracy, time and FLOPs of both runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curve, bars) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colors = {"dense": "tab:gray", "pyramiddrop": "tab:blue"}
    for name, folder in folders.items():
        steps, elapsed, seconds = read_lines(folder / "metrics.jsonl"), 0.0, []
        for step in steps:
            elapsed += step["step_time"]
            seconds.append(elapsed)
        window = 10
        losses = [step["loss"] for step in steps]
        smooth = [
            sum(losses[max(0, i - window + 1) : i + 1]) / len(losses[max(0, i - window + 1) : i + 1])
            for i in range(len(losses))
        ]
        curve.plot(seconds, smooth, label=name, color=colors[name])
    curve.set(xlabel="seconds of training", ylabel=f"loss (mean of {window} steps)", ylim=(0, 1.2))
    curve.grid(alpha=0.3)
    curve.legend()
    dense, dropped = results["dense"], results["pyramiddrop"]
    labels = ["exact match", "time", "FLOPs"]
    heights = {
        "dense": [dense["exact_match"], 1.0, 1.0],
        "pyramiddrop": [
            dropped["exact_match"],
            dropped["train_seconds"] / dense["train_seconds"],
            dropped["flops"] / dense["flops"],
        ],
    }
    for offset, (name, values) in zip((-0.2, 0.2), heights.items(), strict=True):
        drawn = bars.bar([i + offset for i in range(3)], values, 0.38, label=name, color=colors[name])
        bars.bar_label(drawn, fmt="%.2f")
    bars.set_xticks(range(3), labels)
    bars.set(ylim=(0, 1.2), ylabel="share; time and FLOPs relative to dense")
    bars.legend(loc="upper right", ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"wrote {path}")
