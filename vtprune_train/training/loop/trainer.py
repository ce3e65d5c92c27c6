"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtprune_train.config.load import dump_config
from vtprune_train.config.settings import Config
from vtprune_train.core.rounding import ceil_of
from vtprune_train.core.stream import PackedBatch
from vtprune_train.data.load.collate import Collator
from vtprune_train.data.load.loader import StepLoader
from vtprune_train.data.plan.planner import Planner, StepPlan
from vtprune_train.processes.signals import STOP, agreed_code
from vtprune_train.training import distributed as ranks
from vtprune_train.training.checkpoint.folder import CheckpointFolder, TrainerState
from vtprune_train.training.engine.engine import Engine
from vtprune_train.training.faults.non_finite import Skipped, judge
from vtprune_train.training.faults.watchdog import Watchdog
from vtprune_train.training.loop.callback import Callback
from vtprune_train.training.loop.feed import Fetched, fetched
from vtprune_train.training.loop.hooks import Hooks
from vtprune_train.training.loop.seed import mixed
from vtprune_train.training.loop.step_metrics import counts, dropping, finite, speed, waits
from vtprune_train.training.loop.trackers import Trackers
from vtprune_train.training.optimizer import set_rates
from vtprune_train.training.schedules import load_schedule


@dataclass
class Trainer:
    """Runs global steps: ``planner`` chooses their samples, ``collate`` makes the batches. ``processor`` is saved with
    every export, and ``watchdog`` gets a mark at every phase of a step. See
    :class:`vtprune_train.training.loop.callback.Trainer` for what callbacks may use."""

    config: Config
    engine: Engine
    collate: Collator
    eval_collate: Collator | None
    planner: Planner
    processor: Any
    checkpoints: CheckpointFolder
    callbacks: Sequence[Callback]
    trackers: Trackers
    device: torch.device
    state: TrainerState
    watchdog: Watchdog

    def __post_init__(self) -> None:
        train = self.config.train
        self.total_steps = train.max_steps or train.epochs * self.planner.steps_per_epoch
        self.end_step = min(self.total_steps, self.config.run.stop_after or self.total_steps)
        self.warmup_steps = ceil_of(train.warmup_ratio, self.total_steps)
        self.row_losses: list[Tensor] = []  # of the last step's micro-batches, [num_targets] each
        self.batches: Sequence[PackedBatch] = ()  # of the last step
        self.samples: Sequence[int] = ()  # of the last step, of all ranks
        self._ahead: Fetched | None = None  # of the next step
        self._supervised = 0  # tokens of the next step, over all ranks
        self._waited = 0.0  # seconds spent fetching the last batches
        self._measured: dict[int, dict[str, float]] = {}  # costs of micro-batches counted on the device
        self._saved_step = self.state.step if self.state.step else -1
        self._schedule = load_schedule(train)
        self._hooks = Hooks(self.callbacks)
        self._hooks.check_states(self.state.callbacks)
        self.stop_code = 0  # exit code of the signal that ended training

    def call(self, hook: str, *arguments: Any) -> None:
        """Call a hook of every callback, in order."""
        self._hooks.call(hook, self, *arguments)

    def fit(self) -> int:
        """Train to the end, or until a signal asks any rank to stop. Returns the process's exit code."""
        try:
            return self._fit()
        except Exception as error:
            self._hooks.call_on_error(self, error)
            self.trackers.finish(failed=True)
            raise
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
        self.engine.train()
        self._hooks.load_state_dict(self.state.callbacks)
        self.call("on_start")
        self.stop_code = self._steps(fetched(loader))
        self.save()
        self.watchdog.mark("saving")
        self.checkpoints.wait()
        self.watchdog.mark("at the end")
        self.stop_code = self.stop_code or self._stop_code()
        self.call("on_end", self.state.step >= self.total_steps and not self.stop_code)
        self.trackers.finish()
        return self.stop_code or self._stop_code()

    def _steps(self, feed: Iterator[Fetched]) -> int:
        """Run all remaining steps. Returns the exit code if a rank received a stop signal, else 0."""
        self._ahead = self._fetch(feed, self.state.step)
        self.watchdog.mark("counting targets")
        self._supervised = int(self._sum(self._counts_ahead())["supervised_ahead"])
        stop = 0
        while self._ahead is not None and not stop:
            record, stop = self.step(self._ahead, feed)
            self.watchdog.mark("after the step")
            if record["skipped"] is not None:
                self.call("on_skip", record)
            self.call("on_step", record)
            if stop or self.state.step % self.config.train.save_every == 0:
                self.save()
        return stop

    def _fetch(self, feed: Iterator[Fetched], step: int) -> Fetched | None:
        """The batches of global step ``step``, counted from 0; ``None`` after the last one."""
        self.watchdog.mark("waiting for data", step + 1)
        began = time.perf_counter()
        ahead = next(feed, None)
        self._waited = time.perf_counter() - began
        return ahead

    def _counts_ahead(self) -> dict[str, float]:
        """Loss normalizer (supervised tokens) of the next step; only known after image decoding, because images may be
        unreadable."""
        batches = self._ahead.batches if self._ahead is not None else ()
        return {"supervised_ahead": sum(len(batch.targets) for batch in batches)}

    def _stop_code(self) -> int:
        """Exit code for signals received so far by any rank (identical on all ranks); 0 if none."""
        return agreed_code(self._sum(STOP.requested()))

    def step(self, now: Fetched, feed: Iterator[Fetched]) -> tuple[dict[str, Any], int]:
        """Run one optimizer step over all micro-batches of all ranks, prefetching the next step's batches from
        ``feed``. Returns its metrics and the exit code (0 unless a rank received a stop signal)."""
        self.watchdog.mark("at its start", now.plan.step + 1)
        began = time.perf_counter()
        plan, self.batches, self.samples, supervised = now.plan, now.batches, now.plan.samples, self._supervised
        self._seed(plan)
        rates = self._set_rates(plan)
        totals = self._gradients(now, supervised, feed)
        per_token = 1 / supervised if supervised else math.nan
        loss, consistency = totals.pop("cross_entropy") * per_token, totals.pop("consistency") * per_token
        grad_norm = math.sqrt(totals.pop("squared_norm")) / self.engine.loss_scale
        skipped = judge(self, plan, now.batches, supervised, loss + consistency, grad_norm)
        if skipped is None:
            skipped = self._optimizer_step()
        self.state.step = plan.step + 1
        stop = agreed_code(totals)
        seconds = time.perf_counter() - began - self._waited + now.data_wait
        timing = speed(now, totals, seconds, self.device)
        record = {
            "step": self.state.step,
            "epoch": plan.epoch,
            "loss": finite(loss),
            "learning_rates": rates,
            "grad_norm": finite(grad_norm),
            "skipped": skipped,
            "samples": len(plan.samples),
            "micro_steps": len(now.batches),
            "supervised_tokens": supervised,
            "token_accuracy": totals.pop("correct") / max(1, supervised),
            **dropping(self.collate, plan.step, consistency),
            **totals,
            **timing,
        }
        return record, stop

    def single_step(self, now: Fetched) -> dict[str, Any]:
        """Run one step without fetching the next one, to measure it. Returns its metrics."""
        counted = self._sum({"supervised": float(sum(len(batch.targets) for batch in now.batches))})
        self._supervised = int(counted["supervised"])
        return self.step(now, iter(()))[0]

    def _gradients(self, now: Fetched, supervised: int, feed: Iterator[Fetched]) -> dict[str, float]:
        """Accumulate the step's gradients, and fetch the next step's batches while a GPU computes them. Returns losses,
        counts and flags of this step and the token count of the next one, reduced over ranks in a single all-reduce."""
        self.row_losses, self._measured = [], {}
        world_size = ranks.world_size()
        sums = self._forward_backward(now.batches if supervised else (), world_size / max(1, supervised))
        squares = self.engine.squared_grad_norm()
        self._ahead = self._fetch(feed, now.plan.step + 1)
        self.watchdog.mark("summing over ranks", now.plan.step + 1)
        failed = {"save_failed": float(self.checkpoints.failed), **STOP.requested()}
        counted = counts(self.collate, now.batches, self._measured, self.config.model.dtype)
        totals = self._sum(
            {**failed, **counted, **self._counts_ahead(), **waits(now.data_wait)}, {**sums, "squared_norm": squares}
        )
        self._supervised = int(totals.pop("supervised_ahead"))
        if totals.pop("save_failed"):
            self.checkpoints.wait()  # raises on all ranks
        return totals

    def _forward_backward(self, batches: Sequence[PackedBatch], scale: float) -> dict[str, Tensor]:
        """Accumulate gradients of ``scale`` times the summed loss. DeepSpeed averages gradients over ranks, so use
        scale = world_size / supervised_tokens to get the mean over the step's tokens. Returns this rank's summed
        cross-entropy, KL term (0 without teacher) and correct-token count as device tensors, and stores per-token
        losses in ``row_losses``."""
        sums = torch.zeros(3, device=self.device)
        for index, batch in enumerate(batches):
            with self.engine.accumulate(last=index == len(batches) - 1):
                self.watchdog.mark(f"forward {index + 1} of {len(batches)}")
                output = self.engine(batch.to(self.device))
                self.watchdog.mark(f"backward {index + 1} of {len(batches)}")
                self.engine.backward(output.loss_sum * scale)
            self.row_losses.append(output.row_loss)
            if any(boundary.drop.adaptive for boundary in batch.plan.boundaries):
                self._measured[index] = self.collate.measured_costs(batch, output.plan)
            cross_entropy = output.row_loss.sum()
            divergence = torch.zeros_like(cross_entropy) if output.consistency is None else output.consistency
            sums += torch.stack([cross_entropy, divergence, output.correct.sum()])
        return dict(zip(("cross_entropy", "consistency", "correct"), sums, strict=True))

    def repeat(self, plan: StepPlan, batches: Sequence[PackedBatch], supervised: float) -> None:
        """Rerun a step's forward and backward passes for diagnosis; gradients are discarded."""
        self._seed(plan)
        self._forward_backward(batches, ranks.world_size() / supervised)
        self.engine.zero_grad()

    def _optimizer_step(self) -> Skipped | None:
        """Apply the optimizer step. Returns ``overflow`` if float16 loss scaling skipped it."""
        self.watchdog.mark("optimizer")
        self.state.skipped_in_a_row = 0
        if self.engine.step():
            return None
        self.state.overflows += 1
        return "overflow"

    def _set_rates(self, plan: StepPlan) -> dict[str, float]:
        """Set the scheduled learning rate of each part. Skipped steps do not advance the schedule."""
        updates = plan.step - self.state.skipped - self.state.overflows
        factor = self._schedule(updates, self.total_steps, self.warmup_steps)
        return set_rates(self.engine.param_groups, self.config.model.train, factor)

    def _seed(self, plan: StepPlan) -> None:
        torch.manual_seed(mixed(self.config.run.seed, plan.step, ranks.rank()))

    def save(self) -> None:
        """Start saving a checkpoint of the current step, unless it already exists."""
        if self._saved_step == self.state.step:
            return
        self.watchdog.mark("saving")
        self.checkpoints.wait()  # the saving thread reads the model's config
        self._note_schedule()
        self.state.callbacks = self._hooks.state_dict()
        files = [] if ranks.rank() else [file for callback in self.callbacks for file in callback.files()]
        logs = {file.path.name: file.copy() for file in files}
        last = self.state.step >= self.total_steps
        self.checkpoints.save(self.engine, self.processor, self.state, dump_config(self.config), logs, last)
        self._saved_step = self.state.step
        self.call("on_save")

    def _note_schedule(self) -> None:
        """Record the state of the pruning schedule in ``trainer.json`` and, beside the settings of the method
        (``pruning``), in the export's ``config.json``."""
        phases, config = self.collate.phases, self.engine.module.config
        num_layers = self.collate.cost.decoder.num_layers
        self.state.pruning = phases.state(self.state.step, num_layers) if phases is not None else {}
        if self.state.pruning:
            config.pruning_training = self.state.pruning
        elif hasattr(config, "pruning_training"):  # from the checkpoint that this run was initialized from
            del config.pruning_training

    def _sum(self, values: dict[str, float], on_device: dict[str, Tensor] | None = None) -> dict[str, float]:
        return ranks.sum_over_ranks(values, self.device, on_device)
