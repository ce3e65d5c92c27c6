#!/usr/bin/env python
"""Compare the accuracy of bfloat16 training with and without FP8 matrix multiplications on the quickstart model.

    python scripts/compare_fp8.py [--steps 600]    # runs/fp8: result.json and fp8.png

On a CPU the rounding to float8 is emulated, so only losses and accuracies are meaningful, not times. Needs torchao.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from quickstart import DATA, NUM_TRAIN, ROOT, finish, fresh, read_lines, start, write_json

from vtprune_train.data.synthetic import write_dataset

FOLDER = Path("runs/fp8")
WINDOW = 20
# FP8 requires sizes that are multiples of 16.
SETTINGS = ["model.dtype=bfloat16", "model.config.text_config.intermediate_size=176", "train.eval_shuffled=false"]
SIDES = {"bfloat16": "model.fp8=false", "fp8": "model.fp8=true"}


def mean_losses(folder: Path) -> list[float]:
    """Moving average of the loss over ``WINDOW`` steps."""
    losses = [row["loss"] for row in read_lines(folder / "metrics.jsonl")]
    windows = [losses[max(0, end - WINDOW) : end] for end in range(1, len(losses) + 1)]
    return [sum(window) / len(window) for window in windows]


def plot(losses: dict[str, list[float]], path: Path) -> None:
    """Plot both loss curves and their difference."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, difference) = plt.subplots(
        2, 1, figsize=(7, 5), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    for name, values in losses.items():
        curves.plot(range(1, len(values) + 1), values, label=name)
    curves.set(ylabel=f"loss (mean of {WINDOW} steps)", yscale="log")
    curves.grid(alpha=0.3)
    curves.legend()
    gap = [fp8 - plain for plain, fp8 in zip(losses["bfloat16"], losses["fp8"], strict=True)]
    difference.plot(range(1, len(gap) + 1), gap, color="tab:gray")
    difference.axhline(0, color="black", linewidth=0.8)
    difference.set(xlabel="step", ylabel="fp8 - bfloat16")
    difference.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"wrote {path}")


def summarize(folders: dict[str, Path]) -> dict[str, dict[str, float]]:
    """The last loss and the held-out accuracy of each run."""
    return {
        name: {"loss": mean_losses(path)[-1], "exact_match": read_lines(path / "eval.jsonl")[-1]["exact_match"]}
        for name, path in folders.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    os.chdir(ROOT)
    write_dataset(DATA, num_train=NUM_TRAIN, num_eval=500, seed=7)
    folders = {name: fresh(FOLDER / name) for name in SIDES}
    steps = [f"train.max_steps={arguments.steps}", *SETTINGS]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    finish([start(folders[name], [setting, *steps], 1, threads) for name, setting in SIDES.items()])
    result = summarize(folders)
    for name, values in result.items():
        print(f"{name:10} loss {values['loss']:.4f}, held-out exact match {values['exact_match']:.1%}")
    write_json(FOLDER / "result.json", {"steps": arguments.steps, **result})
    plot({name: mean_losses(path) for name, path in folders.items()}, FOLDER / "fp8.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
