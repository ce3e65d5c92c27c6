"""Handling of steps that must not update the model; all ranks act identically.

Decisions are based on values reduced over ranks, so all ranks agree; they are made after the last backward pass and
before the optimizer step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Literal

from vtprune_train.core.stream import PackedBatch
from vtprune_train.data.plan.planner import StepPlan
from vtprune_train.training import distributed as ranks
from vtprune_train.training.faults.diagnosis import Watch, first_fault, non_finite_parameters, write_report
from vtprune_train.training.faults.trainer import Trainer

log = logging.getLogger(__name__)

# Reasons for skipped steps, as recorded in metrics.jsonl.
Skipped = Literal["non_finite", "overflow", "unsupervised"]
LARGEST_NORM = 3.4e38**0.5  # DeepSpeed and PyTorch square norms in float32
EXIT_STOPPED = 3


class TrainingError(RuntimeError):
    """Training cannot continue. All ranks raise it at the same step."""


def judge(
    trainer: Trainer, plan: StepPlan, batches: Sequence[PackedBatch], supervised: float, loss: float, grad_norm: float
) -> Skipped | None:
    """Why this step must be skipped, or ``None``. Clears its gradients if so. Called after the last backward pass.

    Args:
        supervised: number of supervised tokens over all ranks.
        loss: mean loss over them; NaN if there are none.
        grad_norm: global gradient norm.

    Raises:
        TrainingError: the settings stop the run in this case, or too many steps have been skipped.
    """
    config, step = trainer.config, plan.step + 1
    if not supervised:
        problem = "its samples have no supervised token, or cannot be read"
        _refuse_unless(config.data.unsupervised == "skip", problem, "data.unsupervised", step)
        return _count(trainer, "unsupervised", problem, step)
    if math.isfinite(loss) and grad_norm < LARGEST_NORM:
        return None
    if math.isfinite(loss) and trainer.engine.loss_scale_may_fall:
        return None  # float16: DeepSpeed will skip the step and lower the loss scale
    trainer.engine.zero_grad()
    what = f"the gradient's norm is {grad_norm:g}" if math.isfinite(loss) else f"the loss is {loss}"
    problem = f"{what}; no parameter was updated\n{_examine(trainer, plan, batches, supervised, what)}"
    _refuse_unless(config.train.on_non_finite == "skip", problem, "train.on_non_finite", step)
    return _count(trainer, "non_finite", problem, step)


def _refuse_unless(skip: bool, problem: str, key: str, step: int) -> None:
    if not skip:
        raise TrainingError(f"step {step}: {problem}\nset {key}=skip to skip and count such steps")


def _count(trainer: Trainer, kind: Skipped, problem: str, step: int) -> Skipped:
    """Count a skipped step; abort the run if there are too many."""
    state, train = trainer.state, trainer.config.train
    state.skipped += 1
    state.skipped_in_a_row += 1
    for count, bound, key in (
        (state.skipped, train.max_skipped, "max_skipped"),
        (state.skipped_in_a_row, train.max_skipped_in_a_row, "max_skipped_in_a_row"),
    ):
        if count > bound:
            bounded = f"{count} steps were skipped, more than train.{key}={bound}"
            raise TrainingError(f"step {step}: {problem}\n{bounded}")
    if ranks.rank() == 0:
        log.warning("skipping step %d (%d skipped so far): %s", step, state.skipped, problem)
    return kind


def _examine(trainer: Trainer, plan: StepPlan, batches: Sequence[PackedBatch], supervised: float, what: str) -> str:
    """Rerun the step with Watch; rank 0 writes a report of all ranks' findings. Returns a summary and the report's
    path."""
    losses = [float(row_loss.mean()) if len(row_loss) else None for row_loss in trainer.row_losses]
    module = trainer.engine.module
    with Watch(module) as watch:
        trainer.repeat(plan, batches, supervised)
    report_of_rank = {
        "rank": ranks.rank(),
        "losses": losses,
        "parameters": non_finite_parameters(module),
        "micro_batches": watch.micro_batches,
    }
    reports = ranks.gather(report_of_rank)
    path = trainer.config.run_dir / "non_finite" / f"step_{plan.step + 1:08d}.json"
    report = {"step": plan.step + 1, "what": what, "fault": first_fault(reports), "ranks": reports}
    return f"{report['fault']}\n{ranks.from_rank_0(lambda: write_report(path, report))}"
