"""Protocol of the trainer as used here; the trainer imports this package, so importing it back would be circular."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from vtprune_train.config.settings import Config
from vtprune_train.core.stream import PackedBatch
from vtprune_train.data.load.collate import Collator
from vtprune_train.data.plan.planner import Planner, StepPlan
from vtprune_train.training.checkpoint.folder import TrainerState
from vtprune_train.training.engine.engine import Engine


class Trainer(Protocol):
    """See :class:`vtprune_train.training.loop.trainer.Trainer`."""

    config: Config
    engine: Engine
    collate: Collator
    planner: Planner
    device: torch.device
    state: TrainerState
    end_step: int
    row_losses: list[torch.Tensor]

    def repeat(self, plan: StepPlan, batches: Sequence[PackedBatch], supervised: float) -> None:
        """Rerun a step's forward and backward passes; the gradients are discarded."""
