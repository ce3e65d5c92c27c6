"""The training loop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vtprune_train.config import Config
from vtprune_train.data.collate import Collator
from vtprune_train.data.loader import StepLoader
from vtprune_train.data.planner import Planner, StepPlan, data_digest
from vtprune_train.stream import PackedBatch
from vtprune_train.training import distributed as ranks
from vtprune_train.training.callbacks import Callback
from vtprune_train.training.checkpoint import CheckpointFolder, TrainerState
from vtprune_train.training.engine import total_gradient_norm
from vtprune_train.training.metrics import device_peak_flops, peak_memory_bytes
from vtprune_train.training.optim import rate_factor, set_rates
from vtprune_train.training.watchdog import Watchdog

EXIT_TERMINATED = 143


class TrainingError(RuntimeError):
    """Training cannot go on; all ranks raise it at the same step, before the optimizer step."""


@dataclass
class Trainer:
    """Runs global steps on a DeepSpeed engine.

    Args:
        config: the run's settings.
        engine: from :func:`vtprune_train.training.engine.start_engine`.
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
        self.warmup_steps = math.ceil(train.warmup_ratio * self.total_steps)
        self.terminated = False
        self._saved_step = self.state.step if self.state.step else -1

    def fit(self) -> int:
        """Train to the end, or until SIGTERM reaches any rank. Returns the process's exit code."""
        try:
            return self._fit()
        finally:
            self.checkpoints.settle()

    def _fit(self) -> int:
        signal.signal(signal.SIGTERM, self._on_sigterm)
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
        self.engine.train()
        for callback in self.callbacks:
            callback.on_start(self)
        self.watchdog.mark("waiting for data", self.state.step + 1)
        waiting_since = time.perf_counter()
        stop = False
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
        self.watchdog.mark("at the end")
        self.checkpoints.wait()
        for callback in self.callbacks:
            callback.on_end(self, finished=self.state.step >= self.total_steps)
        return EXIT_TERMINATED if stop else 0

    def step(self, plan: StepPlan, batches: Sequence[PackedBatch], data_wait: float) -> tuple[dict[str, Any], bool]:
        """One optimizer step over all micro-batches of all ranks: its metrics, and whether a rank was told to stop."""
        self.watchdog.mark("counting targets")
        began = time.perf_counter()
        torch.manual_seed(hash((self.config.run.seed, plan.step, ranks.rank())) % 2**63)
        factor = rate_factor(plan.step, self.total_steps, self.warmup_steps, self.config.train.schedule)
        rates = set_rates(self.engine.optimizer, self.config.model.train, factor)
        supervised = self._sum({"supervised": sum(len(batch.targets) for batch in batches)})["supervised"]
        if not supervised:
            raise TrainingError(f"step {plan.step}: no sample of the step has a supervised token that could be read")
        sums = self._forward_backward(batches, ranks.world_size() / supervised)
        self.watchdog.mark("summing over ranks")
        totals = self._sum({**sums, **self._totals(batches)})
        if totals.pop("save_failed"):
            self.checkpoints.wait()  # raises on all ranks
        loss, consistency = totals.pop("cross_entropy") / supervised, totals.pop("consistency") / supervised
        if not math.isfinite(loss + consistency):
            raise TrainingError(
                f"step {plan.step}: the loss is {loss}; no parameter was changed. Lower model.train's rates, "
                f"or look at this step's samples: {[self.collate.index.sample_id(s) for s in plan.samples][:8]} ..."
            )
        grad_norm = self._optimizer_step()
        self.state.step = plan.step + 1
        if totals["unreadable"]:
            self._note_unreadable(batches)
        stop = totals.pop("stop") > 0
        ids = [self.collate.index.sample_id(sample) for sample in plan.samples]
        seconds = time.perf_counter() - began + data_wait
        peak = device_peak_flops(self.device)
        record = {
            "step": self.state.step,
            "epoch": plan.epoch,
            "loss": loss,
            "learning_rates": rates,
            "grad_norm": grad_norm,
            "samples": len(ids),
            "data_digest": data_digest(ids),
            "micro_steps": len(batches),
            "supervised_tokens": int(supervised),
            "token_accuracy": totals.pop("correct") / supervised,
            **self._schedule(plan.step, consistency),
            **totals,
            "step_time": seconds,
            "data_wait": data_wait,
            "data_wait_share": data_wait / seconds,
            "data_wait_longest": ranks.max_over_ranks(data_wait, self.device),
            "tokens_per_second": totals["tokens_stage_0"] / seconds,
            "mfu": totals["flops"] / seconds / (peak * ranks.world_size()) if peak else None,
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }
        return record, stop

    def _forward_backward(self, batches: Sequence[PackedBatch], scale: float) -> dict[str, float]:
        """Accumulate gradients of ``scale`` times the summed loss (DeepSpeed averages over ranks, so the scale that
        gives the mean over the step's supervised tokens is ranks / tokens). Returns this rank's cross-entropy,
        divergence from the teacher's pass (0 without one) and correct tokens, summed."""
        sums = torch.zeros(3, device=self.device)
        for index, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            self.watchdog.mark(f"forward {index + 1} of {len(batches)}")
            output = self.engine(batch.to(self.device))
            self.watchdog.mark(f"backward {index + 1} of {len(batches)}")
            self.engine.backward(output.loss_sum * scale, scale_wrt_gas=False)
            divergence = torch.zeros_like(output.cross_entropy) if output.consistency is None else output.consistency
            sums += torch.stack([output.cross_entropy, divergence, output.correct.sum()])
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
                shown["consistency_loss"] = consistency
        return shown

    def _optimizer_step(self) -> float | None:
        self.watchdog.mark("optimizer")
        norm = None
        if not hasattr(self.engine.optimizer, "_global_grad_norm"):  # ZeRO 0 in float32: a plain PyTorch optimizer
            norm = total_gradient_norm(self.engine)
        self.engine.step()
        measured = self.engine.get_global_grad_norm()
        return norm if measured is None else float(measured)

    def _totals(self, batches: Sequence[PackedBatch]) -> dict[str, float]:
        """This rank's counts of the step, the same names on every rank."""
        stages = (f"tokens_stage_{i}" for i in range(self.collate.num_stages))
        names = ["flops", "flops_dense", "visual_tokens", *stages]
        costs = {name: sum(batch.costs.get(name, 0.0) for batch in batches) for name in names}
        unreadable = float(sum(len(batch.unreadable) for batch in batches))
        failed = float(self.checkpoints.failed)
        return {"unreadable": unreadable, "stop": float(self.terminated), "save_failed": failed, **costs}

    def _note_unreadable(self, batches: Sequence[PackedBatch]) -> None:
        """Count pictures that could not be read, on every rank alike; too many stop the run.

        Raises:
            TrainingError: more than ``data.max_bad`` samples were left out so far.
        """
        new = [f"{sample}: {reason}" for batch in batches for sample, reason in batch.unreadable]
        for line in new:
            ranks.log.warning("step %d: left out %s", self.state.step, line)
        new = [line for lines in ranks.gather(new) for line in lines]
        known = set(self.state.unreadable)
        self.state.unreadable += [line for line in new if line not in known]
        count = len(self.state.unreadable) + self.collate.index.bad
        if count > self.config.data.max_bad:
            raise TrainingError(
                f"{count} samples could not be used, more than data.max_bad={self.config.data.max_bad}; mend them or "
                f"raise it. Last: {self.state.unreadable[-1]}"
            )

    def save(self) -> None:
        """Begin a checkpoint of the current step, unless there is one."""
        if self._saved_step == self.state.step:
            return
        from vtprune_train.config import dump_config

        self.watchdog.mark("saving")
        self.checkpoints.wait()  # its thread reads the model's config
        self._note_schedule()
        self.checkpoints.save(self.engine, self.processor, self.state, dump_config(self.config))
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

    def _on_sigterm(self, *_: Any) -> None:
        self.terminated = True
