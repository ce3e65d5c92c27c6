"""Loss-spike detection: compare with the median of recent steps and report the responsible samples."""

from __future__ import annotations

import logging
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vtprune_train.training import distributed as ranks
from vtprune_train.training.checkpoint.json_lines import JsonLines
from vtprune_train.training.loop.callback import Trainer
from vtprune_train.training.loop.callbacks.metrics import LineFile

log = logging.getLogger(__name__)

HISTORY = 20  # minimum number of steps before spikes are reported
SAMPLES = 16  # number of samples with the highest loss to report
LEAST_SPREAD = 1e-3  # minimum deviation relative to the median, so that noise in a flat loss is not a spike


def z_score(loss: float, recent: list[float]) -> float:
    """Number of standard deviations by which ``loss`` exceeds the median of ``recent``. The standard deviation is
    estimated robustly as 1.4826 * MAD (exact for a normal distribution), so earlier spikes do not affect it."""
    median = float(np.median(recent))
    spread = 1.4826 * float(np.median(np.abs(np.asarray(recent) - median)))
    return (loss - median) / max(spread, LEAST_SPREAD * abs(median), 1e-12)


def sample_losses(trainer: Trainer) -> list[dict[str, Any]]:
    """This rank's samples of the last step with their mean token loss, sorted descending."""
    losses: list[dict[str, Any]] = []
    for batch, row_loss in zip(trainer.batches, trainer.row_losses, strict=True):
        parts = torch.split(row_loss.cpu(), list(batch.targets_per_sample))
        for sample, part in zip(batch.sample_ids, parts, strict=True):
            if len(part):
                losses.append({"id": sample, "loss": float(part.mean()), "tokens": len(part)})
    return sorted(losses, key=lambda entry: -entry["loss"])[:SAMPLES]


class Spikes(LineFile):
    """Log a warning and write a line to ``spikes.jsonl`` for every step with a loss spike.

    Uses the last ``window`` steps of ``metrics.jsonl``, so a resumed run behaves like an uninterrupted one;
    ``threshold`` is in standard deviations above their median.
    """

    def __init__(self, run_dir: Path, threshold: float, window: int):
        super().__init__(JsonLines(run_dir / "spikes.jsonl"))
        self.metrics = JsonLines(run_dir / "metrics.jsonl")
        self.threshold = threshold
        self.recent: deque[float] = deque(maxlen=window)

    def on_start(self, trainer: Trainer) -> None:
        super().on_start(trainer)

        def known() -> list[float]:
            lines = [line for line in self.metrics.read() if line["step"] <= trainer.state.step]
            losses = [line.get("loss") for line in lines]  # lines without a copy in a checkpoint may be damaged
            return [loss for loss in losses if isinstance(loss, float)][-(self.recent.maxlen or 0) :]

        self.recent.extend(ranks.from_rank_0(known))

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        loss = metrics["loss"]
        if loss is None:
            return
        score = z_score(loss, list(self.recent)) if len(self.recent) >= HISTORY else 0.0
        self.recent.append(loss)
        if score > self.threshold:  # same decision on all ranks, since they have the same losses
            self._report(trainer, metrics["step"], loss, score)

    def _report(self, trainer: Trainer, step: int, loss: float, score: float) -> None:
        worst = [entry for part in ranks.gather(sample_losses(trainer)) for entry in part]
        worst = sorted(worst, key=lambda entry: -entry["loss"])[:SAMPLES]
        if ranks.rank():
            return
        self.file.append({"step": step, "loss": loss, "z": score, "samples": worst})
        named = ", ".join(f"{entry['id']} ({entry['loss']:.3g})" for entry in worst[:4])
        log.warning(
            "step %d: the loss %.4g is a spike, %.1f standard deviations above the median; highest: %s (more in %s)",
            step, loss, score, named, self.file.path,
        )  # fmt: skip
