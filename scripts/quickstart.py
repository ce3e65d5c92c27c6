#!/usr/bin/env python
"""Quickstart: generate synthetic data, train a tiny model with PyramidDrop on two CPU ranks, evaluate it, and print a
table.

python scripts/quickstart.py             # runs/quickstart/result.json
python scripts/quickstart.py --compare   # PyramidDrop and dense: runs/compare/result.json and compare.png
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vtprune_train.data.synthetic import write_dataset  # noqa: E402

DATA = Path("runs/data/quickstart")
CONFIG = "configs/quickstart.yaml"
NUM_TRAIN = 6000


def fresh(run_dir: Path) -> Path:
    """Create the folder, deleting it first if it exists."""
    if run_dir.exists():
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True)
    return run_dir


def start(run_dir: Path, overrides: list[str], ranks: int, threads: int | None = None) -> subprocess.Popen[bytes]:
    """Train in ``run_dir`` through the DeepSpeed launcher, with ``threads`` for each rank (default: cores / ranks)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(port)]
    settings = [f"run.output_dir={run_dir.parent}", f"run.name={run_dir.name}", *overrides]
    command = [*launcher, "train.py", "--config", CONFIG, *settings]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    print(f"$ deepspeed --num_gpus {ranks} train.py --config {CONFIG} {' '.join(settings)}", flush=True)
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def finish(runs: list[subprocess.Popen[bytes]]) -> None:
    """Wait for all runs.

    Raises:
        SystemExit: if a run fails.
    """
    codes = [run.wait() for run in runs]
    if any(codes):
        raise SystemExit(f"training failed (exit codes {codes})")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def summarize(run_dir: Path) -> dict[str, Any]:
    """Summary of a run: held-out accuracy, training time, FLOPs, tokens per stage."""
    steps = read_lines(run_dir / "metrics.jsonl")
    held_out = read_lines(run_dir / "eval.jsonl")[-1]
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
    print(f"\n{'':14}{'exact match':>12}{'shuffled':>10}{'steps':>7}{'seconds':>9}{'TFLOP':>8}  tokens by stage")
    for name, result in results.items():
        tokens = " / ".join(f"{count:.0f}" for count in result["tokens_per_stage"])
        print(
            f"{name:14}{result['exact_match']:>11.1%}{result['exact_match_shuffled']:>10.1%}{result['steps']:>7}"
            f"{result['train_seconds']:>9.0f}{result['flops'] / 1e12:>8.1f}  {tokens}"
        )
    print("shuffled: exact match with images shuffled between samples (answers without the right image)\n")


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
    print(f"wrote {path}")


def plot_comparison(folders: dict[str, Path], results: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot loss over time and compare accuracy, time and FLOPs."""
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compare", action="store_true", help="train PyramidDrop and dense, same data, same steps")
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks (default: 2)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    write_dataset(DATA, num_train=NUM_TRAIN, num_eval=500, seed=7)
    if not arguments.compare:
        run_dir = fresh(Path("runs/quickstart"))
        finish([start(run_dir, arguments.overrides, arguments.ranks)])
        result = summarize(run_dir)
        print_table({"pyramiddrop": result})
        write_json(run_dir / "result.json", result)
        return 0
    folder = Path("runs/compare")
    folders = {name: fresh(folder / name) for name in ("dense", "pyramiddrop")}
    settings = {"dense": ["pruning.method=none", *arguments.overrides], "pyramiddrop": arguments.overrides}
    # Run both at the same time on half of the cores each, so that other load affects both equally.
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    finish([start(folders[name], settings[name], 1, threads) for name in folders])
    results = {name: summarize(run_dir) for name, run_dir in folders.items()}
    print_table(results)
    time_ratio = results["pyramiddrop"]["train_seconds"] / results["dense"]["train_seconds"]
    flop_ratio = results["pyramiddrop"]["flops"] / results["dense"]["flops"]
    print(f"time ratio {time_ratio:.3f}, FLOP ratio {flop_ratio:.3f}, quotient {time_ratio / flop_ratio:.3f}")
    write_json(folder / "result.json", {**results, "time_ratio": time_ratio, "flop_ratio": flop_ratio})
    plot_comparison(folders, results, folder / "compare.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
