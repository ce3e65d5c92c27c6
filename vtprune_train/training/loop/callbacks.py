"""What happens around the loop: metrics, progress, evaluation, plots."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vtprune_train.data.load.collate import Collator
from vtprune_train.data.plan.planner import data_digest
from vtprune_train.files.disk import naming
from vtprune_train.training import distributed as ranks
from vtprune_train.training.checkpoint.json_lines import JsonLines
from vtprune_train.training.loop.evaluate import evaluate
from vtprune_train.training.loop.trainer import Callback, Trainer

log = logging.getLogger(__name__)


@contextmanager
def only_warning(what: str | Path) -> Iterator[None]:
    """For what training can do without (plots, pictures, the progress bar): an error is a warning that names it."""
    try:
        yield
    except Exception as error:
        log.debug("where it came from", exc_info=True)
        log.warning("%s could not be written (%s: %s); training does without it", what, type(error).__name__, error)


class Carried(Callback):
    """A file that every checkpoint holds a copy of, also while nothing adds lines to it (evaluation is off)."""

    def __init__(self, file: JsonLines):
        self.file = file

    def on_start(self, trainer: Trainer) -> None:
        ranks.from_rank_0(lambda: self.file.rewind(trainer.state.step, trainer.checkpoints.resumed))

    def files(self) -> list[JsonLines]:
        return [self.file]


class Metrics(Carried):
    """``metrics.jsonl``: a line for every step, with the digest of its samples' ids."""

    def __init__(self, run_dir: Path):
        super().__init__(JsonLines(run_dir / "metrics.jsonl", every_step=True))

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        if ranks.rank() == 0:
            ids = [trainer.collate.index.sample_id(sample) for sample in trainer.samples]
            self.file.append({**record, "data_digest": data_digest(ids)})


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
        loss = str(record["skipped"]) if record["loss"] is None else f"{record['loss']:.3f}"
        shown = {"loss": loss, "tok_s": f"{record['tokens_per_second']:.0f}"}
        if trainer.collate.phases is not None and trainer.collate.phases.vary:
            shown["keep"] = "/".join(f"{share:.3g}" for share in record["keep"])
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        self.bar.close()


class Evaluation(Carried):
    """Held-out loss and exact match every ``train.eval_every`` steps and at the end, in ``eval.jsonl``."""

    def __init__(self, run_dir: Path, collate: Collator):
        super().__init__(JsonLines(run_dir / "eval.jsonl"))
        self.collate = collate
        self._last_step = -1

    def on_start(self, trainer: Trainer) -> None:
        super().on_start(trainer)
        self._last_step = ranks.from_rank_0(lambda: max((line["step"] for line in self.file.read()), default=-1))

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        every = trainer.config.train.eval_every
        if every and record["step"] % every == 0:
            self._evaluate(trainer)

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        if finished and self._last_step != trainer.state.step:
            self._evaluate(trainer)

    def _evaluate(self, trainer: Trainer) -> None:
        began = time.perf_counter()
        data = trainer.config.data
        run = partial(
            evaluate, trainer.engine.module, self.collate, max_tokens=data.max_tokens, device=trainer.device,
            workers=data.workers, worker_timeout=data.worker_timeout, mark=trainer.watchdog.mark,
        )  # fmt: skip
        result = run()
        if trainer.config.train.eval_shuffled:
            result["exact_match_shuffled"] = run(shuffle_images=True)["exact_match"]
        for callback in trainer.callbacks:
            callback.on_evaluation(trainer, self.collate)
        self._last_step = trainer.state.step
        if ranks.rank():
            return
        line = {"step": trainer.state.step, **result, "seconds": time.perf_counter() - began}
        self.file.append(line, sync=True)  # the last one comes after the last checkpoint
        shown = ", ".join(f"{name} {value:.4g}" for name, value in result.items())
        tqdm.write(f"step {trainer.state.step}: held-out {shown}")
        trainer.engine.monitors.write(eval_scalars(line))


def eval_scalars(line: dict[str, Any]) -> list[tuple[str, float, int]]:
    """What monitors show of a line of ``eval.jsonl``."""
    return [(f"eval/{name}", value, line["step"]) for name, value in line.items() if name not in ("step", "seconds")]


class Plot(Callback):
    """``loss.png``: loss and tokens per second over steps."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        if ranks.rank() == 0:
            path = self.run_dir / "loss.png"
            with only_warning(path):
                plot_training(JsonLines(self.run_dir / "metrics.jsonl").read(), path)


def plot_training(records: list[dict[str, Any]], path: Path) -> None:
    """Draw loss and throughput of a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [record["step"] for record in records]
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    losses = [math.nan if record["loss"] is None else record["loss"] for record in records]
    above.plot(steps, losses, linewidth=1)
    above.set_ylabel("loss")
    below.plot(steps, [record["tokens_per_second"] for record in records], linewidth=1, color="tab:green")
    below.set_ylabel("tokens/s (before dropping)")
    below.set_xlabel("global step")
    below.set_ylim(bottom=0)
    for axis in (above, below):
        axis.grid(alpha=0.3)
    partial = path.with_name(f"{path.name}.tmp")
    try:
        with naming(partial):
            figure.savefig(partial, dpi=120, format="png")
        partial.replace(path)
    finally:
        plt.close(figure)
        partial.unlink(missing_ok=True)
