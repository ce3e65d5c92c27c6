"""Loss spikes: told apart from noise by the median of recent steps, and traced to samples."""

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

HISTORY = 20  # steps before the first judgement
SAMPLES = 16  # of the step with the highest losses are named
LEAST_SPREAD = 1e-3  # of the median: losses that hardly differ make no spike of their noise


def z_score(loss: float, recent: list[float]) -> float:
    """How many standard deviations ``loss`` lies above the median of ``recent``; the deviation is estimated by the
    median absolute one (times 1.4826, right for a normal distribution), which spikes among ``recent`` do not move."""
    median = float(np.median(recent))
    spread = 1.4826 * float(np.median(np.abs(np.asarray(recent) - median)))
    return (loss - median) / max(spread, LEAST_SPREAD * abs(median), 1e-12)


def sample_losses(trainer: Trainer) -> list[dict[str, Any]]:
    """This rank's samples of the last step with the mean loss of their tokens, highest first."""
    found: list[dict[str, Any]] = []
    for batch, row_loss in zip(trainer.batches, trainer.row_losses, strict=True):
        parts = torch.split(row_loss.cpu(), list(batch.targets_per_sample))
        for sample, part in zip(batch.sample_ids, parts, strict=True):
            if len(part):
                found.append({"id": sample, "loss": float(part.mean()), "tokens": len(part)})
    return sorted(found, key=lambda entry: -entry["loss"])[:SAMPLES]


class Spikes(LineFile):
    """A warning and a line in ``spikes.jsonl`` for every step whose loss lies far above those before it.

    It looks back at ``window`` steps of ``metrics.jsonl``, so that a resumed run judges as one that was never
    interrupted; ``threshold`` is in standard deviations above their median.
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
            losses = [line.get("loss") for line in lines]  # a line that no checkpoint holds may have lost its own
            return [loss for loss in losses if isinstance(loss, float)][-(self.recent.maxlen or 0) :]

        self.recent.extend(ranks.from_rank_0(known))

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        loss = record["loss"]
        if loss is None:
            return
        score = z_score(loss, list(self.recent)) if len(self.recent) >= HISTORY else 0.0
        self.recent.append(loss)
        if score > self.threshold:  # on all ranks or on none: they know the same losses
            self._tell(trainer, record["step"], loss, score)

    def _tell(self, trainer: Trainer, step: int, loss: float, score: float) -> None:
        worst = [entry for part in ranks.gather(sample_losses(trainer)) for entry in part]
        worst = sorted(worst, key=lambda entry: -entry["loss"])[:SAMPLES]
        if ranks.rank():
            return
        self.file.append({"step": step, "loss": loss, "z": score, "samples": worst})
        named = ", ".join(f"{entry['id']} ({entry['loss']:.3g})" for entry in worst[:4])
        log.warning(
            "step %d: the loss %.4g is a spike, %.1f deviations above the median; highest: %s (more in %s)",
            step, loss, score, named, self.file.path,
        )  # fmt: skip
