"""Evaluation during training."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import Any

from vtprune_train.training import distributed as ranks
from vtprune_train.training.loop.callback import Trainer
from vtprune_train.training.loop.callbacks.metrics import LineFile
from vtprune_train.training.loop.evaluate import evaluate

log = logging.getLogger(__name__)


class Evaluation(LineFile):
    """Evaluates on ``data.eval`` every ``train.eval_every`` steps and at the end, and appends to ``eval.jsonl``."""

    _last_step = -1

    def on_start(self, trainer: Trainer) -> None:
        super().on_start(trainer)
        self._last_step = ranks.from_rank_0(lambda: max((line["step"] for line in self.file.read()), default=-1))

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        every = trainer.config.train.eval_every
        if every and metrics["step"] % every == 0:
            self._evaluate(trainer)

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        if finished and self._last_step != trainer.state.step:
            self._evaluate(trainer)

    def _evaluate(self, trainer: Trainer) -> None:
        if trainer.eval_collate is None:
            return
        began, data = time.perf_counter(), trainer.config.data
        run = partial(
            evaluate, trainer.engine.module, trainer.eval_collate, max_tokens=data.max_tokens, device=trainer.device,
            workers=data.workers, worker_timeout=data.worker_timeout, mark=trainer.watchdog.mark,
        )  # fmt: skip
        result = run()
        if trainer.config.train.eval_shuffled:
            result["exact_match_shuffled"] = run(shuffle_images=True)["exact_match"]
        self._last_step = trainer.state.step
        line = {"step": trainer.state.step, **result, "seconds": time.perf_counter() - began}
        if ranks.rank() == 0:
            self.file.append(line, sync=True)  # synced: no checkpoint has a copy of the last line
            log.info(
                "step %d: held-out %s", trainer.state.step, ", ".join(f"{name} {v:.4g}" for name, v in result.items())
            )
        trainer.call("on_evaluate", line)
