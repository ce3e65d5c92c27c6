"""What happens around the loop: metrics, progress, evaluation, plots."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vtprune_train.data.collate import Collator
from vtprune_train.training import distributed as ranks
from vtprune_train.training.evaluate import evaluate
from vtprune_train.training.shown import survivors

if TYPE_CHECKING:
    from vtprune_train.training.trainer import Trainer


class Callback:
    """Hooks of the loop. Every rank calls them at the same steps."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this process."""

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """After an optimizer step, with its metrics."""

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        """After the last step of this process and its checkpoint; ``finished`` if training is complete."""


class JsonLines:
    """A file of one JSON object a line, kept in step with training: lines beyond the step resumed from go."""

    def __init__(self, path: Path):
        self.path = path

    def rewind(self, step: int) -> None:
        """Keep the lines up to ``step``; a line cut off by a crash goes too."""
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break
            if record["step"] > step:
                break
            kept.append(line + "\n")
        shorter = self.path.with_suffix(".tmp")
        shorter.write_text("".join(kept))
        shorter.replace(self.path)

    def append(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]


class Metrics(Callback):
    """``metrics.jsonl``, and the same numbers to TensorBoard through DeepSpeed's monitor."""

    SHOWN = ("loss", "grad_norm", "tokens_per_second", "step_time", "data_wait", "token_accuracy")

    def __init__(self, run_dir: Path):
        self.file = JsonLines(run_dir / "metrics.jsonl")

    def on_start(self, trainer: Trainer) -> None:
        if ranks.rank() == 0:
            self.file.rewind(trainer.state.step)

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        if ranks.rank():
            return
        self.file.append(record)
        events = [(f"train/{name}", record[name], record["step"]) for name in self.SHOWN if record[name] is not None]
        events += [(f"train/keep_{i}", share, record["step"]) for i, share in enumerate(record.get("keep", ()), 1)]
        if "consistency_loss" in record:
            events.append(("train/consistency_loss", record["consistency_loss"], record["step"]))
        events += [(f"learning_rate/{part}", rate, record["step"]) for part, rate in record["learning_rates"].items()]
        if trainer.engine.monitor.enabled:
            trainer.engine.monitor.write_events(events)


class Progress(Callback):
    """A progress bar on rank 0."""

    def on_start(self, trainer: Trainer) -> None:
        phases = trainer.collate.phases
        if phases is not None and phases.vary and not ranks.rank():
            tqdm.write(f"pruning: {phases.describe()}")
            if phases.warmup is not None and phases.warmup.steps > trainer.total_steps:
                ranks.log.warning(
                    "pruning.warmup lasts %d steps, longer than the training (%d): it never reaches pruning.keep",
                    phases.warmup.steps,
                    trainer.total_steps,
                )
        self.bar = tqdm(
            total=trainer.total_steps,
            initial=trainer.state.step,
            desc="train",
            disable=ranks.rank() != 0,
            mininterval=1.0,
        )

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        shown = {"loss": f"{record['loss']:.3f}", "tok_s": f"{record['tokens_per_second']:.0f}"}
        if trainer.collate.phases is not None and trainer.collate.phases.vary:
            shown["keep"] = "/".join(f"{share:.3g}" for share in record["keep"])
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        self.bar.close()


class Evaluation(Callback):
    """Held-out loss and exact match every ``train.eval_every`` steps and at the end, in ``eval.jsonl``."""

    def __init__(self, run_dir: Path, collate: Collator):
        self.file, self.collate = JsonLines(run_dir / "eval.jsonl"), collate
        self._last_step = -1

    def on_start(self, trainer: Trainer) -> None:
        def last_recorded() -> int:
            self.file.rewind(trainer.state.step)
            return max((record["step"] for record in self.file.read()), default=-1)

        self._last_step = ranks.from_rank_0(last_recorded)

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        every = trainer.config.train.eval_every
        if every and record["step"] % every == 0:
            self._evaluate(trainer)

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        if finished and self._last_step != trainer.state.step:
            self._evaluate(trainer)

    def _evaluate(self, trainer: Trainer) -> None:
        began = time.perf_counter()
        options: dict[str, Any] = {
            "max_tokens": trainer.config.data.max_tokens,
            "device": trainer.device,
            "workers": min(1, trainer.config.data.workers),
            "worker_timeout": trainer.config.data.worker_timeout,
            "mark": trainer.watchdog.mark,
        }
        result = evaluate(trainer.engine.module, self.collate, **options)
        if trainer.config.train.eval_shuffled:
            shuffled = evaluate(trainer.engine.module, self.collate, shuffle_pictures=True, **options)
            result["exact_match_shuffled"] = shuffled["exact_match"]
        if trainer.config.train.eval_show and self.collate.method is not None:
            self._show(trainer)
        self._last_step = trainer.state.step
        if ranks.rank():
            return
        self.file.append({"step": trainer.state.step, **result, "seconds": time.perf_counter() - began})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in result.items())
        tqdm.write(f"step {trainer.state.step}: held-out {shown}")
        if trainer.engine.monitor.enabled:
            trainer.engine.monitor.write_events([(f"eval/{k}", v, trainer.state.step) for k, v in result.items()])

    def _show(self, trainer: Trainer) -> None:
        """The first pictures with the tokens that survive, to TensorBoard."""
        pictures = trainer.config.train.eval_show
        drawn = survivors(trainer.engine.module, self.collate, pictures=pictures, device=trainer.device)
        for number, pixels in enumerate(drawn):  # none but on rank 0
            writer = trainer.engine.monitor.tb_monitor.summary_writer
            writer.add_image(f"survivors/{number}", pixels, trainer.state.step, dataformats="HWC")


class Plot(Callback):
    """``loss.png``: loss and tokens per second over steps."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        if ranks.rank() == 0:
            plot_training(JsonLines(self.run_dir / "metrics.jsonl").read(), self.run_dir / "loss.png")


def plot_training(records: list[dict[str, Any]], path: Path) -> None:
    """Draw loss and throughput of a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [record["step"] for record in records]
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    above.plot(steps, [record["loss"] for record in records], linewidth=1)
    above.set_ylabel("loss")
    below.plot(steps, [record["tokens_per_second"] for record in records], linewidth=1, color="tab:green")
    below.set_ylabel("tokens/s (before dropping)")
    below.set_xlabel("global step")
    below.set_ylim(bottom=0)
    for axis in (above, below):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
