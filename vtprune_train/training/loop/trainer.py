"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vtprune_train.config.load import dump_config
from vtprune_train.config.settings import Config
from vtprune_train.core.rounding import ceil_of
from vtprune_train.core.stream import PackedBatch
from vtprune_train.data.index import most_bad
from vtprune_train.data.load.collate import Collator
from vtprune_train.data.load.loader import StepLoader
from vtprune_train.data.plan.planner import Planner, StepPlan, data_digest
from vtprune_train.processes.signals import STOP, agreed_code
from vtprune_train.training import distributed as ranks
from vtprune_train.training.checkpoint.folder import CheckpointFolder, TrainerState
from vtprune_train.training.engine.gradients import discard, loss_scale, squared_norm
from vtprune_train.training.faults.non_finite import Skipped, TrainingError, judge
from vtprune_train.training.faults.watchdog import Watchdog
from vtprune_train.training.loop.callbacks import Callback
from vtprune_train.training.loop.metrics import device_peak_flops, peak_memory_bytes
from vtprune_train.training.loop.optimizer import rate_factor, set_rates

# What a step sums over its micro-batches, of what the collator counted in each.
COUNTED = (
    "flops",
    "flops_dense",
    "flops_selector",
    "visual_tokens",
    "visual_tokens_entering",
    "visual_tokens_leaving",
    "cache_values",
)


@dataclass
class Trainer:
    """Runs global steps on a DeepSpeed engine.

    Args:
        config: the run's settings.
        engine: from :func:`vtprune_train.training.engine.start.start_engine`.
        collate: samples to batches.
        planner: which samples, and to which rank.
        processor: saved with every export.
        checkpoints: where states are kept.
        callbacks: called after every step and at the end.
        device: this rank's.
        state: where training stands.
        watchdog: told of every phase of a step.
    """

    config: Config
    engine: Any
    collate: Collator
    planner: Planner
    processor: Any
    checkpoints: CheckpointFolder
    callbacks: Sequence[Callback]
    device: torch.device
    state: TrainerState
    watchdog: Watchdog

    def __post_init__(self) -> None:
        train = self.config.train
        self.total_steps = train.max_steps or train.epochs * self.planner.steps_per_epoch
        self.end_step = min(self.total_steps, self.config.run.stop_after or self.total_steps)
        self.warmup_steps = ceil_of(train.warmup_ratio, self.total_steps)
        self.row_losses: list[torch.Tensor] = []  # of the last step's micro-batches, [R] each
        self.batches: Sequence[PackedBatch] = ()  # of the last step
        self._measured: dict[int, dict[str, float]] = {}  # costs of its micro-batches that counted on the device
        self._saved_step = self.state.step if self.state.step else -1

    def fit(self) -> int:
        """Train to the end, or until a signal asks any rank to stop. Returns the process's exit code."""
        try:
            return self._fit()
        finally:
            self.checkpoints.settle()

    def _fit(self) -> int:
        loader = StepLoader(
            self.collate,
            self.planner,
            first_step=self.state.step,
            end_step=self.end_step,
            rank=ranks.rank(),
            workers=self.config.data.workers,
            device=self.device,
            prefetch=self.config.data.prefetch,
            timeout=self.config.data.worker_timeout,
        )
        self._warn_of_no_steps()
        self.engine.train()
        for callback in self.callbacks:
            callback.on_start(self)
        self.watchdog.mark("waiting for data", self.state.step + 1)
        waiting_since = time.perf_counter()
        stop = 0
        for plan, batches in loader:
            data_wait = time.perf_counter() - waiting_since
            record, stop = self.step(plan, batches, data_wait)
            record["batches_ready"] = loader.ready
            self.watchdog.mark("after the step")
            for callback in self.callbacks:
                callback.on_step(self, record)
            if stop or self.state.step % self.config.train.save_every == 0:
                self.save()
            if stop:
                break
            self.watchdog.mark("waiting for data", self.state.step + 1)
            waiting_since = time.perf_counter()
        self.save()
        self.watchdog.mark("saving")
        self.checkpoints.wait()
        self.watchdog.mark("at the end")
        stop = stop or self._stop_code()
        for callback in self.callbacks:
            callback.on_end(self, finished=self.state.step >= self.total_steps and not stop)
        return stop or self._stop_code()

    def _stop_code(self) -> int:
        """The exit code for the signals that ranks have heard until now, the same on all; 0 without one."""
        return agreed_code(self._sum(STOP.requested()))

    def _warn_of_no_steps(self) -> None:
        if self.state.step >= self.end_step and ranks.rank() == 0:
            ranks.log.warning(
                "nothing is trained: the checkpoint of run.name=%s is at step %d, and the settings end at step %d; "
                "raise train.epochs or train.max_steps (or run.stop_after), or start another run by another run.name",
                self.config.run.name, self.state.step, self.end_step,
            )  # fmt: skip

    def step(self, plan: StepPlan, batches: Sequence[PackedBatch], data_wait: float) -> tuple[dict[str, Any], int]:
        """One optimizer step over all micro-batches of all ranks: its metrics, and the exit code if a rank was told to
        stop (else 0)."""
        self.watchdog.mark("counting targets")
        began = time.perf_counter()
        self._seed(plan)
        rates = self._set_rates(plan)
        supervised = int(self._sum({"supervised": sum(len(batch.targets) for batch in batches)})["supervised"])
        totals = self._gradients(batches, supervised)
        per_token = 1 / supervised if supervised else math.nan
        loss, consistency = totals.pop("cross_entropy") * per_token, totals.pop("consistency") * per_token
        grad_norm = math.sqrt(totals.pop("squared_norm")) / loss_scale(self.engine)
        skipped = judge(self, plan, batches, supervised, loss + consistency, grad_norm)
        if skipped is None:
            skipped = self._optimizer_step()
        self.state.step = plan.step + 1
        if totals["unreadable"]:
            self._note_unreadable(batches)
        stop = agreed_code(totals)
        ids = [self.collate.index.sample_id(sample) for sample in plan.samples]
        record = {
            "step": self.state.step,
            "epoch": plan.epoch,
            "loss": loss if math.isfinite(loss) else None,
            "learning_rates": rates,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "skipped": skipped,
            "samples": len(ids),
            "data_digest": data_digest(ids),
            "micro_steps": len(batches),
            "supervised_tokens": supervised,
            "token_accuracy": totals.pop("correct") / max(1, supervised),
            **self._schedule(plan.step, consistency),
            **totals,
            **self._speed(totals, time.perf_counter() - began + data_wait, data_wait),
        }
        return record, stop

    def _gradients(self, batches: Sequence[PackedBatch], supervised: int) -> dict[str, float]:
        """Accumulate the step's gradients. Returns its losses, counts and flags, summed over ranks.

        Raises:
            CheckpointError: on all ranks, if the save in flight has failed on one.
        """
        self.batches, self.row_losses, self._measured = batches, [], {}
        sums = self._forward_backward(batches if supervised else (), ranks.world_size() / max(1, supervised))
        self.watchdog.mark("summing over ranks")
        squares = {"squared_norm": float(squared_norm(self.engine, ranks.world_size()))}
        totals = self._sum({**sums, **squares, **self._totals(batches)})
        if totals.pop("save_failed"):
            self.checkpoints.wait()
        return totals

    def _speed(self, totals: dict[str, float], seconds: float, data_wait: float) -> dict[str, Any]:
        """The step's time and memory, and what was done in it; all ranks call this together."""
        peak = device_peak_flops(self.device)
        return {
            "step_time": seconds,
            "data_wait": data_wait,
            "data_wait_share": data_wait / seconds,
            "data_wait_longest": ranks.max_over_ranks(data_wait, self.device),
            "tokens_per_second": totals["tokens_stage_0"] / seconds,
            "mfu": totals["flops"] / seconds / (peak * ranks.world_size()) if peak else None,
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }

    def _forward_backward(self, batches: Sequence[PackedBatch], scale: float) -> dict[str, float]:
        """Accumulate gradients of ``scale`` times the summed loss (DeepSpeed averages over ranks, so the scale that
        gives the mean over the step's supervised tokens is ranks / tokens). Returns this rank's cross-entropy,
        divergence from the teacher's pass (0 without one) and correct tokens, summed, and leaves the cross-entropy of
        every token in ``row_losses``."""
        sums = torch.zeros(3, device=self.device)
        for index, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            self.watchdog.mark(f"forward {index + 1} of {len(batches)}")
            output = self.engine(batch.to(self.device))
            self.watchdog.mark(f"backward {index + 1} of {len(batches)}")
            self.engine.backward(output.loss_sum * scale, scale_wrt_gas=False)
            self.row_losses.append(output.row_loss)
            if any(boundary.drop.adaptive for boundary in batch.plan.boundaries):
                self._measured[index] = self.collate.measured_costs(batch, output.plan)
            cross_entropy = output.row_loss.sum()
            divergence = torch.zeros_like(cross_entropy) if output.consistency is None else output.consistency
            sums += torch.stack([cross_entropy, divergence, output.correct.sum()])
            if index < len(batches) - 1:
                self.engine.step()
        return dict(zip(("cross_entropy", "consistency", "correct"), sums.tolist(), strict=True))

    def _schedule(self, step: int, consistency: float) -> dict[str, Any]:
        """What the step dropped: shares kept in each stage after the first, and what a full-token step adds."""
        phases = self.collate.phases
        if phases is None or phases.method is None:
            return {}
        shown: dict[str, Any] = {"keep": phases.keep(step, self.collate.cost.decoder.num_layers)}
        if phases.full.share:
            phase = phases.of(step)
            shown["full_tokens"] = phase.full_tokens
            if phase.teacher is not None:
                shown["consistency_loss"] = consistency if math.isfinite(consistency) else None
        return shown

    def repeat(self, plan: StepPlan, batches: Sequence[PackedBatch], supervised: float) -> None:
        """Run a step's forward and backward passes once more, to look at them; its gradients are thrown away."""
        self._seed(plan)
        self._forward_backward(batches, ranks.world_size() / supervised)
        discard(self.engine)

    def _optimizer_step(self) -> Skipped | None:
        """Change the model; ``overflow`` where float16's loss scaling left the step out instead."""
        self.watchdog.mark("optimizer")
        self.engine.step()
        self.state.skipped_in_a_row = 0
        if self.engine.was_step_applied():
            return None
        self.state.overflows += 1
        return "overflow"

    def _set_rates(self, plan: StepPlan) -> dict[str, float]:
        """The schedule's rates, by part. A step without an update does not move it."""
        updates = plan.step - self.state.skipped - self.state.overflows
        factor = rate_factor(updates, self.total_steps, self.warmup_steps, self.config.train.schedule)
        return set_rates(self.engine.optimizer, self.config.model.train, factor)

    def _seed(self, plan: StepPlan) -> None:
        torch.manual_seed(hash((self.config.run.seed, plan.step, ranks.rank())) % 2**63)

    def _totals(self, batches: Sequence[PackedBatch]) -> dict[str, float]:
        """This rank's counts of the step, the same names on every rank."""
        stages = (f"tokens_stage_{i}" for i in range(self.collate.num_stages))
        names = [*COUNTED, *stages]
        counted = [self._measured.get(index, batch.costs) for index, batch in enumerate(batches)]
        costs = {name: sum(own.get(name, 0.0) for own in counted) for name in names}
        costs["cache_bytes"] = costs.pop("cache_values") * getattr(torch, self.config.model.dtype).itemsize
        unreadable = float(sum(len(batch.unreadable) for batch in batches))
        failed = float(self.checkpoints.failed)
        return {"unreadable": unreadable, "save_failed": failed, **STOP.requested(), **costs}

    def _note_unreadable(self, batches: Sequence[PackedBatch]) -> None:
        """Count pictures that could not be read, on every rank alike; too many stop the run.

        Raises:
            TrainingError: more samples were left out so far than ``data.max_bad`` or ``data.max_bad_share`` allow.
        """
        new = [f"{sample}: {reason}" for batch in batches for sample, reason in batch.unreadable]
        for line in new:
            ranks.log.warning("step %d: left out %s", self.state.step, line)
        new = [line for lines in ranks.gather(new) for line in lines]
        known = set(self.state.unreadable)
        self.state.unreadable += [line for line in new if line not in known]
        count = len(self.state.unreadable) + self.collate.index.bad
        settings, samples = self.config.data, len(self.collate.index)
        limit = f"data.max_bad={settings.max_bad}" if count > settings.max_bad else ""
        if len(self.state.unreadable) > most_bad(settings.max_bad_share, samples):
            limit = limit or f"data.max_bad_share={settings.max_bad_share:g} of {samples}"
        if limit:
            raise TrainingError(
                f"{count} samples could not be used, more than {limit}; mend them or raise it. "
                f"Last: {self.state.unreadable[-1]}"
            )

    def save(self) -> None:
        """Begin a checkpoint of the current step, unless there is one."""
        if self._saved_step == self.state.step:
            return
        self.watchdog.mark("saving")
        self.checkpoints.wait()  # its thread reads the model's config
        self._note_schedule()
        files = [] if ranks.rank() else [file for callback in self.callbacks for file in callback.files()]
        logs = {file.path.name: file.copy() for file in files}
        last = self.state.step >= self.total_steps
        self.checkpoints.save(self.engine, self.processor, self.state, dump_config(self.config), logs, last)
        self._saved_step = self.state.step

    def _note_schedule(self) -> None:
        """Into the checkpoint's ``trainer.json`` and ``config.json``: where the schedule stands. The target's settings
        are in ``config.json`` as ever (``pruning``); what training did on the way there stands beside them."""
        phases, config = self.collate.phases, self.engine.module.config
        num_layers = self.collate.cost.decoder.num_layers
        self.state.pruning = phases.state(self.state.step, num_layers) if phases is not None else {}
        if self.state.pruning:
            config.pruning_training = self.state.pruning
        elif hasattr(config, "pruning_training"):  # of the checkpoint that this run started from
            del config.pruning_training

    def _sum(self, values: dict[str, float]) -> dict[str, float]:
        return ranks.sum_over_ranks(values, self.device)
