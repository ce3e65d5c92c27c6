"""Console output of a run."""

from __future__ import annotations

import logging
import shlex
import signal
import sys
import time
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from vtprune_train.pruning.phases import Budgets
from vtprune_train.training import distributed as ranks
from vtprune_train.training.loop.callback import Callback, Trainer
from vtprune_train.training.loop.layout import has_videos

log = logging.getLogger(__name__)

LINE_SECONDS = 10.0  # interval of progress lines without a terminal


class Progress(Callback):
    """Logs on rank 0 how the run starts, proceeds and ends. Progress is shown as a bar on a terminal, otherwise as a
    line every few seconds."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._bar: tqdm[Any] | None = None
        self._began = self._last_line = 0.0
        self._first_step = 0

    def on_start(self, trainer: Trainer) -> None:
        self._began, self._first_step = time.monotonic(), trainer.state.step
        self._last_line = self._began - LINE_SECONDS  # the first step is logged at once
        if ranks.rank():
            return
        log_start(trainer)
        if sys.stderr.isatty():
            bar = tqdm(total=trainer.total_steps, initial=trainer.state.step, desc="train", mininterval=1.0)
            self._bar = self._open.enter_context(bar)
            self._open.enter_context(logging_redirect_tqdm())

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        if ranks.rank():
            return
        numbers = step_numbers(trainer, metrics)
        if self._bar is not None:
            self._bar.set_postfix(numbers, refresh=False)
            self._bar.update()
        elif time.monotonic() - self._last_line >= LINE_SECONDS or metrics["step"] == trainer.end_step:
            self._last_line = time.monotonic()
            text = ", ".join(f"{name} {value}" for name, value in numbers.items())
            log.info("step %d of %d: %s%s", metrics["step"], trainer.total_steps, text, self._left(trainer))

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        self._open.close()
        if ranks.rank() == 0:
            seconds = time.monotonic() - self._began
            for line in end_lines(trainer, finished, trainer.state.step - self._first_step, seconds):
                log.info("%s", line)

    def on_error(self, trainer: Trainer, error: Exception) -> None:
        self._open.close()

    def _left(self, trainer: Trainer) -> str:
        done, left = trainer.state.step - self._first_step, trainer.end_step - trainer.state.step
        if not left or done < 2:  # the first step is slower
            return ""
        return f", about {duration((time.monotonic() - self._began) / done * left)} left"


def log_start(trainer: Trainer) -> None:
    """Log the first step, the data, the pruning method and the devices."""
    config, phases, step = trainer.config, trainer.collate.phases, trainer.state.step
    if step >= trainer.end_step:
        log.warning(
            "nothing to train: run.name=%s has a checkpoint of step %d, and the settings end at step %d; raise "
            "train.epochs or train.max_steps (or run.stop_after), or start another run with another run.name",
            config.run.name, step, trainer.end_step,
        )  # fmt: skip
        return
    weights = config.train.init_from or config.model.path or config.model.language_model
    new = f"new run from {weights}" if weights else "new run with random weights"
    began = f"resumed from step {step}" if step else new
    log.info(
        "%s: %d samples, %d steps of %d samples, pruning by %s, on %s, in %s",
        began, len(trainer.collate.index), trainer.total_steps, config.train.global_batch_size,
        config.pruning.method, where(trainer), config.run_dir,
    )  # fmt: skip
    if phases is not None and phases.vary:
        log.info("pruning during training: %s", phases.describe())
        budgets, varied = config.pruning.budgets, phases.varied
        if budgets is not None and isinstance(varied, Budgets) and (varied.low, varied.high) != budgets:
            log.warning(
                "pruning.budgets=%s, but with %d layers %s reaches only %g to %g; other budgets are not trained",
                list(budgets), varied.num_layers, config.pruning.method, varied.low, varied.high,
            )  # fmt: skip
        if phases.warmup is not None and phases.warmup.steps > trainer.total_steps:
            log.warning(
                "pruning.warmup takes %d steps, more than the training (%d): it never reaches pruning.keep",
                phases.warmup.steps, trainer.total_steps,
            )  # fmt: skip


def where(trainer: Trainer) -> str:
    """The devices of a run, for example ``8 GPUs``."""
    kind = "GPU" if trainer.device.type == "cuda" else "CPU rank"
    return f"{ranks.world_size()} {kind}{'s' if ranks.world_size() > 1 else ''}"


def step_numbers(trainer: Trainer, metrics: dict[str, Any]) -> dict[str, str]:
    """The numbers of a step that the console shows."""
    loss = str(metrics["skipped"]) if metrics["loss"] is None else f"{metrics['loss']:.3f}"
    numbers = {"loss": loss, "tokens/s": f"{metrics['tokens_per_second']:,.0f}"}
    if trainer.collate.phases is not None and trainer.collate.phases.vary:
        numbers["keep"] = "/".join(f"{share:.3g}" for share in metrics["keep"])
    return numbers


def end_lines(trainer: Trainer, finished: bool, steps: int, seconds: float) -> list[str]:
    """The console lines at the end: where the run is saved, and the next command."""
    config, step = trainer.config, trainer.state.step
    if not steps:
        return []  # log_start has warned
    saved = f"saved step {step} in {config.run_dir / 'checkpoints' / f'step_{step:08d}'}"
    if trainer.stop_code:
        name = signal.Signals(trainer.stop_code - 128).name
        return [f"{name}: {saved}; the same command continues from there"]
    if not finished:
        return [f"run.stop_after={config.run.stop_after}: {saved}; the same command without it continues from there"]
    model, out = shlex.quote(str(config.run_dir)), shlex.quote(f"{config.run_dir}-export")
    kind = "video" if has_videos(config) else "image"
    generating = out if config.train.export == "never" else model
    return [
        f"done: step {step} of {trainer.total_steps}, {steps} step{'' if steps == 1 else 's'} by this process in "
        f"{duration(seconds)}; the run is in {config.run_dir}",
        f"export the model: vtprune export --model {model} --out {out}",
        f'generate an answer: vtprune generate --model {generating} --{kind} FILE --prompt "..."',
    ]


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))
