"""The project's loop in the race: its settings, and the callback that measures it (run by ``train.py``)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from racing.recorder import Recorder
from racing.setup import Setup
from vtprune_train.training.loop.callback import Callback, Trainer
from vtprune_train.training.loop.metrics import device_peak_flops

ROOT = Path(__file__).parents[2]
RESULT, SETTINGS = "RACE_RESULT", "RACE_SETTINGS"


class Measure(Callback):
    """Records every step."""

    def on_start(self, trainer: Trainer) -> None:
        self.recorder = Recorder(trainer.device)
        self.recorder.start()

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self.recorder.step()
        self.recorder.losses.append(metrics["loss"])
        self.recorder.tokens.append(metrics["tokens_stage_0"])
        self.recorder.flops.append(metrics["flops"])
        if trainer.state.step == trainer.end_step:  # before the last checkpoint, which the other rows do not write
            peak = device_peak_flops(trainer.device)
            self.recorder.write(Path(os.environ[RESULT]), json.loads(os.environ[SETTINGS]), peak)


def settings_of(name: str, setup: Setup) -> dict[str, Any]:
    """The settings of ``train.py``, without paths."""
    rate = setup.learning_rate
    return {
        "model": {"dtype": setup.dtype, "train": {"projector": rate, "language_model": rate, "vision_tower": rate}},
        "data": {
            "template": "auto",
            "max_length": setup.longest,
            "max_tokens": setup.micro_batch * setup.longest,
            "workers": 0,
        },
        "pruning": {"method": "pyramiddrop" if name == "loop_prune" else "none"},
        "train": {
            "global_batch_size": setup.global_batch,
            "max_steps": setup.steps,
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "weight_decay": 0.0,
            "clip": setup.clip,
            "activation_checkpointing": "none",
            "export": "never",
        },
        "deepspeed": "configs/deepspeed/zero0.json",
    }


def command(name: str, setup: Setup, out: Path) -> tuple[list[str], dict[str, str]]:
    """The command that trains, and the environment variables that it needs. Writes the config next to ``out``."""
    settings = settings_of(name, setup)
    folder = out.with_suffix("")
    config = {
        **settings,
        "run": {"name": "run", "output_dir": str(folder), "seed": setup.seed},
        "model": {"path": str(setup.checkpoint), **settings["model"]},
        "data": {
            "root": str(setup.data),
            "train": [{"path": "train.json", "images": "images"}],
            "cache_dir": str(folder / "cache"),
            **settings["data"],
        },
        "callbacks": [f"{Path(__file__)}:Measure"],
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return [sys.executable, str(ROOT / "train.py"), "--config", str(path)], {
        RESULT: str(out),
        SETTINGS: json.dumps(settings),
    }
