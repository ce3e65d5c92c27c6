"""DeepSpeed engines in the tests' own process."""

from __future__ import annotations

from vtprune_train.config.settings import Config
from vtprune_train.models.io.build import set_trainable
from vtprune_train.training.loop.adapter import attach_adapter
from vtprune_train.training.loop.parts import build_parts

ALL = {"lora": 1e-3, "projector": 1e-3, "vision_tower": 1e-3}


def settings_of(folder, origin, train=None, **peft):
    """A run in ``folder`` that trains an adapter on what ``origin`` (keys of ``model``) names."""
    return Config(
        run={"name": "run", "output_dir": str(folder)},
        model={"dtype": "float32", "peft": {"r": 4, "alpha": 8, **peft}, "train": train or ALL, **origin},
        pruning={"layers": [2, 4], "keep": [0.5, 0.25]},
        data={"template": "plain"},
    )


class Engine:
    """What collecting weights needs of an engine."""

    zero_stage = 0

    def __init__(self, module):
        self.module = module


def started(config):
    config.run_dir.mkdir(parents=True, exist_ok=True)
    parts = build_parts(config)
    attach_adapter(config, parts.model, parts.processor)
    set_trainable(parts.model, config.model.train)
    return parts
