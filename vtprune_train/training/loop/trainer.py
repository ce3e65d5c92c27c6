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
from vtprune_train.data.index import most_bad
from vtprune_train.data.load.collate import Collator
from vtprune_train.data.load.loader import StepLoader
from vtprune_train.data.plan.planner import Planner, StepPlan
from vtprune_train.processes.signals import STOP, agreed_code
from vtprune_train.training import distributed as ranks
from vtprune_train.training.checkpoint.folder import CheckpointFolder, TrainerState
from vtprune_train.training.checkpoint.json_lines import JsonLines
from vtprune_train.training.engine.engine import Engine
from vtprune_train.training.faults.non_finite import Skipped, TrainingError, judge
from vtprune_train.training.faults.watchdog import Watchdog
from vtprune_train.training.loop.metrics import device_peak_flops
from vtprune_train.training.memory.track import peak_memory_bytes
from vtprune_train.training.optimizer import set_rates
from vtprune_train.training.schedules import rate_factor

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


class Callback:
    """Hooks of the loop. Every rank calls them at the same steps."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this process."""

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """After an optimizer step, with its metrics."""

    def on_evaluation(self, trainer: Trainer, collate: Collator) -> None:
        """During an evaluation, after its numbers; ``collate`` is that of the evaluation data."""

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        """After the last step of this process and its checkpoint; ``finished`` if training is complete."""

    def files(self) -> list[JsonLines]:
        """What the callback writes line by line; every checkpoint holds a copy."""
        return []


def mixed(*numbers: int) -> int:
    """A seed in [0, 2**63) made of non-negative numbers below 2**61 - 1, the same in every version of Python: xxHash's
    rounds as CPython 3.8 to 3.14 hash tuples, since earlier runs, which resume here, took that hash."""
    first, second, fifth, word = 11400714785074694791, 14029467366897019727, 2870177450012600261, 2**64 - 1
    result = fifth
    for number in numbers:
        result = (result + number * second) & word
        result = (result << 31 | result >> 33) & word
        result = result * first & word
    result = (result + (len(numbers) ^ fifth ^ 3527539)) & word
    return (result if result != word else 1546275796) % 2**63


@dataclass
class Fetched:
    """This rank's batches of a global step, one for each micro-step, and the seconds it waited for them; for
    ``batches_ready`` see ``StepLoader.ready``."""

    plan: StepPlan
    batches: Sequence[PackedBatch]
    data_wait: float
    batches_ready: int | None


def fetched(loader: StepLoader) -> Iterator[Fetched]:
    """The loader's steps, each with the time from asking for it to having it."""
    began = time.perf_counter()
    for plan, batches in loader:
        yield Fetched(plan, batches, time.perf_counter() - began, loader.ready)
        began = time.perf_counter()


@dataclass
class Trainer:
    """Runs global steps, the batches of ``planner``'s samples made by ``collate``; ``processor`` is saved with every
    export, and ``watchdog`` gets a mark at every phase of a step."""

    config: Config
    engine: Engine
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
        self.row_losses: list[Tensor] = []  # of the last step's micro-batches, [R] each
        self.batches: Sequence[PackedBatch] = ()  # of the last step
        self.samples: Sequence[int] = ()  # of the last step, of all ranks
        self._ahead: Fetched | None = None  # of the next step
        self._supervised = 0  # tokens of the next step, over all ranks
        self._waited = 0.0  # seconds for the batches fetched last
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
        stop = self._steps(fetched(loader))
        self.save()
        self.watchdog.mark("saving")
        self.checkpoints.wait()
        self.watchdog.mark("at the end")
        stop = stop or self._stop_code()
        for callback in self.callbacks:
            callback.on_end(self, finished=self.state.step >= self.total_steps and not stop)
        return stop or self._stop_code()

    def _steps(self, feed: Iterator[Fetched]) -> int:
        """Every step that is left. Returns the exit code if a rank was told to stop, else 0."""
        self._ahead = self._fetch(feed, self.state.step)
        self.watchdog.mark("counting targets")
        self._supervised = int(self._sum(self._counts_ahead())["supervised_ahead"])
        stop = 0
        while self._ahead is not None and not stop:
            record, stop = self.step(self._ahead, feed)
            self.watchdog.mark("after the step")
            for callback in self.callbacks:
                callback.on_step(self, record)
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
        """What the next step's loss is divided by: known only after decoding, as images may turn out unreadable."""
        batches = self._ahead.batches if self._ahead is not None else ()
        return {"supervised_ahead": sum(len(batch.targets) for batch in batches)}

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

    def step(self, now: Fetched, feed: Iterator[Fetched]) -> tuple[dict[str, Any], int]:
        """One optimizer step over all micro-batches of all ranks: its metrics, and the exit code if a rank was told to
        stop (else 0). Fetches the next step's batches from ``feed`` meanwhile."""
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
        if totals["unreadable"]:
            self._note_unreadable(now.batches)
        stop = agreed_code(totals)
        speed = self._speed(now, totals, time.perf_counter() - began - self._waited + now.data_wait)
        record = {
            "step": self.state.step,
            "epoch": plan.epoch,
            "loss": loss if math.isfinite(loss) else None,
            "learning_rates": rates,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "skipped": skipped,
            "samples": len(plan.samples),
            "micro_steps": len(now.batches),
            "supervised_tokens": supervised,
            "token_accuracy": totals.pop("correct") / max(1, supervised),
            **self._schedule(plan.step, consistency),
            **totals,
            **speed,
        }
        return record, stop

    def _gradients(self, now: Fetched, supervised: int, feed: Iterator[Fetched]) -> dict[str, float]:
        """Accumulate the step's gradients, and fetch the next step's batches while a GPU computes them. Returns the
        step's losses, counts and flags, and the next step's count, in the step's one sum over ranks."""
        self.row_losses, self._measured = [], {}
        world_size = ranks.world_size()
        sums = self._forward_backward(now.batches if supervised else (), world_size / max(1, supervised))
        squares = self.engine.squared_grad_norm()
        self._ahead = self._fetch(feed, now.plan.step + 1)
        self.watchdog.mark("summing over ranks", now.plan.step + 1)
        waits = {f"data_wait_{rank}": now.data_wait * (rank == ranks.rank()) for rank in range(world_size)}
        counts = {**self._totals(now.batches), **self._counts_ahead(), **waits}
        totals = self._sum(counts, {**sums, "squared_norm": squares})
        self._supervised = int(totals.pop("supervised_ahead"))
        if totals.pop("save_failed"):
            self.checkpoints.wait()  # raises on all ranks
        return totals

    def _speed(self, now: Fetched, totals: dict[str, float], seconds: float) -> dict[str, Any]:
        """The step's time and memory, and what was done in it; takes the waits of the ranks out of ``totals``."""
        peak = device_peak_flops(self.device)
        return {
            "step_time": seconds,
            "data_wait": now.data_wait,
            "data_wait_share": now.data_wait / seconds,
            "data_wait_longest": max(totals.pop(f"data_wait_{rank}") for rank in range(ranks.world_size())),
            "batches_ready": now.batches_ready,
            "tokens_per_second": totals["tokens_stage_0"] / seconds,
            "mfu": totals["flops"] / seconds / (peak * ranks.world_size()) if peak else None,
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }

    def _forward_backward(self, batches: Sequence[PackedBatch], scale: float) -> dict[str, Tensor]:
        """Accumulate gradients of ``scale`` times the summed loss (DeepSpeed averages over ranks, so the scale that
        gives the mean over the step's supervised tokens is ranks / tokens). Returns this rank's cross-entropy,
        divergence from the teacher's pass (0 without one) and correct tokens, summed, still on the device, and leaves
        the cross-entropy of every token in ``row_losses``."""
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
        self.engine.zero_grad()

    def _optimizer_step(self) -> Skipped | None:
        """Change the model; ``overflow`` where float16's loss scaling left the step out instead."""
        self.watchdog.mark("optimizer")
        self.state.skipped_in_a_row = 0
        if self.engine.step():
            return None
        self.state.overflows += 1
        return "overflow"

    def _set_rates(self, plan: StepPlan) -> dict[str, float]:
        """The schedule's rates, by part. A step without an update does not move it."""
        updates = plan.step - self.state.skipped - self.state.overflows
        factor = rate_factor(self.config.train, updates, self.total_steps, self.warmup_steps)
        return set_rates(self.engine.param_groups, self.config.model.train, factor)

    def _seed(self, plan: StepPlan) -> None:
        torch.manual_seed(mixed(self.config.run.seed, plan.step, ranks.rank()))

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
        """Count pictures that could not be read, on every rank alike; too many stop the run."""
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

    def _sum(self, values: dict[str, float], on_device: dict[str, Tensor] | None = None) -> dict[str, float]:
        return ranks.sum_over_ranks(values, self.device, on_device)
