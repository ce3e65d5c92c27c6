"""Sends the numbers of ``metrics.jsonl`` and ``eval.jsonl`` to trackers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtprune_train.training.checkpoint.json_lines import JsonLines
from vtprune_train.training.loop.callback import Callback, Trainer
from vtprune_train.training.loop.tensorboard import Scalar, continue_after
from vtprune_train.training.loop.trackers import Trackers


class Tracking(Callback):
    """Sends every number of each step and evaluation to the trackers.

    On resume, TensorBoard hides the steps after the checkpoint, and missing or wrong scalars are written again. Weights
    & Biases continues the same run.
    """

    name = "tracking"

    def __init__(self, trackers: Trackers):
        self.trackers = trackers

    def state_dict(self) -> dict[str, Any]:
        return {"run_ids": self.trackers.run_ids}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trackers.run_ids = state["run_ids"]

    def on_start(self, trainer: Trainer) -> None:
        self.trackers.start()
        self.trackers.with_tensorboard(
            lambda writer: continue_after(trainer.state.step, writer, recorded_scalars(trainer.config.run_dir))
        )

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self.trackers.log(train_numbers(metrics), metrics["step"])

    def on_evaluate(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self.trackers.log(eval_numbers(metrics), metrics["step"])


def recorded_scalars(run_dir: Path) -> list[Scalar]:
    """All scalars that were sent to trackers so far, from the files of the run."""
    scalars: list[Scalar] = []
    for file, numbers in (("metrics.jsonl", train_numbers), ("eval.jsonl", eval_numbers)):
        for line in JsonLines(run_dir / file).read():
            scalars += [(tag, value, line["step"]) for tag, value in numbers(line).items()]
    return scalars


def train_numbers(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of ``metrics.jsonl``, by tag."""
    numbers = {f"train/{key}": value for key, value in line.items() if key != "step"}
    numbers |= {f"train/keep_{stage}": share for stage, share in enumerate(line.get("keep", ()), 1)}
    numbers |= {f"learning_rate/{part}": rate for part, rate in line.get("learning_rates", {}).items()}
    return _only_numbers(numbers)


def eval_numbers(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of ``eval.jsonl``, by tag."""
    return _only_numbers({f"eval/{key}": value for key, value in line.items() if key not in ("step", "seconds")})


def _only_numbers(values: dict[str, Any]) -> dict[str, float]:
    """Keep only numbers, not text, nulls or flags; a damaged line may contain anything."""
    return {name: value for name, value in values.items() if type(value) in (int, float)}
