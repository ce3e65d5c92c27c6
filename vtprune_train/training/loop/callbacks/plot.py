"""``loss.png``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from vtprune_train.files.disk import naming
from vtprune_train.training import distributed as ranks
from vtprune_train.training.checkpoint.json_lines import JsonLines
from vtprune_train.training.loop.callback import Callback, Trainer
from vtprune_train.training.loop.callbacks.optional import only_warning

SMOOTHED_SHARE = 0.015  # time constant of the smoothed loss, as a share of the steps


class Plot(Callback):
    """Draws ``loss.png`` at the end: training loss, held-out loss and throughput over steps."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        if ranks.rank() == 0:
            path = self.run_dir / "loss.png"
            with only_warning(path):
                metrics = JsonLines(self.run_dir / "metrics.jsonl").read()
                plot_training(metrics, JsonLines(self.run_dir / "eval.jsonl").read(), path)


def plot_training(metrics: list[dict[str, Any]], evaluations: list[dict[str, Any]], path: Path) -> None:
    """Draw the lines of ``metrics.jsonl`` and ``eval.jsonl`` into a PNG file, atomically."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [line["step"] for line in metrics]
    losses = [math.nan if line["loss"] is None else line["loss"] for line in metrics]
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    above.plot(steps, losses, linewidth=0.8, color="tab:blue", alpha=0.3, label="loss")
    above.plot(steps, smoothed(losses), linewidth=1.8, color="tab:blue", label="loss, smoothed")
    if evaluations:
        held_out = [line["loss"] for line in evaluations]
        above.plot([line["step"] for line in evaluations], held_out, "o-", color="tab:orange", label="held-out loss")
    above.set_ylabel("loss")
    above.legend()
    below.plot(steps, [line["tokens_per_second"] for line in metrics], linewidth=1, color="tab:green")
    below.set_ylabel("tokens/s (before dropping)")
    below.set_xlabel("global step")
    below.set_ylim(bottom=0)
    for axis in (above, below):
        axis.grid(alpha=0.3)
    partial = path.with_name(f"{path.name}.tmp")
    try:
        with naming(partial):
            figure.savefig(partial, dpi=120, format="png")
        partial.replace(path)
    finally:
        plt.close(figure)
        partial.unlink(missing_ok=True)


def smoothed(losses: list[float]) -> np.ndarray:
    """Exponential moving average without bias towards zero at the beginning; non-finite values are skipped."""
    decay = math.exp(-1 / max(1.0, SMOOTHED_SHARE * len(losses)))
    average = weight = 0.0
    result = np.full(len(losses), math.nan)
    for position, loss in enumerate(losses):
        if math.isfinite(loss):
            average, weight = decay * average + (1 - decay) * loss, decay * weight + (1 - decay)
        if weight:
            result[position] = average / weight
    return result
