"""Steps that must not change the model: what is done about them, by all ranks alike.

Every decision here follows from numbers that were summed over ranks, so all ranks come to the same one; it is made
after the last backward pass and before the optimizer step.
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

# Why a step passed without an update, as metrics.jsonl names it.
Skipped = Literal["non_finite", "overflow", "unsupervised"]
LARGEST_NORM = 3.4e38**0.5  # DeepSpeed and PyTorch square norms in float32
EXIT_STOPPED = 3


class TrainingError(RuntimeError):
    """Training cannot go on; all ranks raise it at the same step, before the optimizer step."""


def judge(
    trainer: Trainer, plan: StepPlan, batches: Sequence[PackedBatch], supervised: float, loss: float, grad_norm: float
) -> Skipped | None:
    """Why this step must not change the model, if so; its gradients are then gone. Called after the last backward pass.

    Args:
        supervised: tokens of all ranks.
        loss: their mean; NaN where there are none.
        grad_norm: of the whole gradient, over all ranks.

    Raises:
        TrainingError: such a step stops the run, or more were skipped than the settings allow.
    """
    config, step = trainer.config, plan.step + 1
    if not supervised:
        problem = "no sample of it has a supervised token that could be read"
        _refuse_unless(config.data.unsupervised == "skip", problem, "data.unsupervised", step)
        return _count(trainer, "unsupervised", problem, step)
    if math.isfinite(loss) and grad_norm < LARGEST_NORM:
        return None
    if math.isfinite(loss) and trainer.engine.loss_scale_may_fall:
        return None  # float16: DeepSpeed will leave the step out and lower its loss scale
    trainer.engine.zero_grad()
    what = f"the gradient's norm is {grad_norm:g}" if math.isfinite(loss) else f"the loss is {loss}"
    problem = f"{what}; no parameter was changed\n{_examine(trainer, plan, batches, supervised, what)}"
    _refuse_unless(config.train.on_non_finite == "skip", problem, "train.on_non_finite", step)
    return _count(trainer, "non_finite", problem, step)


def _refuse_unless(skip: bool, problem: str, key: str, step: int) -> None:
    if not skip:
        raise TrainingError(f"step {step}: {problem}\n{key}=skip would leave such steps out and count them")


def _count(trainer: Trainer, kind: Skipped, problem: str, step: int) -> Skipped:
    """Count one more step without an update; too many end the run."""
    state, train = trainer.state, trainer.config.train
    state.skipped += 1
    state.skipped_in_a_row += 1
    for count, bound, key in (
        (state.skipped, train.max_skipped, "max_skipped"),
        (state.skipped_in_a_row, train.max_skipped_in_a_row, "max_skipped_in_a_row"),
    ):
        if count > bound:
            bounded = f"{count} steps were skipped, train.{key}={bound} allows no more"
            raise TrainingError(f"step {step}: {problem}\n{bounded}")
    if ranks.rank() == 0:
        log.warning("step %d is skipped (%d so far): %s", step, state.skipped, problem)
    return kind


def _examine(trainer: Trainer, plan: StepPlan, batches: Sequence[PackedBatch], supervised: float, what: str) -> str:
    """Repeat the step under watch; rank 0 writes down what all ranks found. Returns the gist, and where it is."""
    losses = [float(row_loss.mean()) if len(row_loss) else None for row_loss in trainer.row_losses]
    module = trainer.engine.module
    with Watch(module) as watch:
        trainer.repeat(plan, batches, supervised)
    own = {
        "rank": ranks.rank(),
        "losses": losses,
        "parameters": non_finite_parameters(module),
        "micro_batches": watch.micro_batches,
    }
    reports = ranks.gather(own)
    path = trainer.config.run_dir / "non_finite" / f"step_{plan.step + 1:08d}.json"
    report = {"step": plan.step + 1, "what": what, "fault": first_fault(reports), "ranks": reports}
    return f"{report['fault']}\n{ranks.from_rank_0(lambda: write_report(path, report))}"
