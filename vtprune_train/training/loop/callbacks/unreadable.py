"""Samples whose images cannot be read."""

from __future__ import annotations

from typing import Any

from vtprune_train.data.index import most_bad
from vtprune_train.training import distributed as ranks
from vtprune_train.training.faults.non_finite import TrainingError
from vtprune_train.training.loop.callback import Callback, Trainer


class Unreadable(Callback):
    """Counts samples that were left out of steps, over all ranks, and stops training when there are too many."""

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        if not metrics["unreadable"]:
            return
        new = [f"{sample}: {reason}" for batch in trainer.batches for sample, reason in batch.unreadable]
        for line in new:
            ranks.log.warning("step %d: left out %s", trainer.state.step, line)
        known, state = set(trainer.state.unreadable), trainer.state
        state.unreadable += [line for lines in ranks.gather(new) for line in lines if line not in known]
        data, index = trainer.config.data, trainer.collate.index
        count, limit = len(state.unreadable) + index.bad, ""
        if count > data.max_bad:
            limit = f"data.max_bad={data.max_bad}"
        elif len(state.unreadable) > most_bad(data.max_bad_share, len(index)):
            limit = f"data.max_bad_share={data.max_bad_share:g} of {len(index)}"
        if limit:
            raise TrainingError(
                f"{count} samples could not be used, more than {limit}; fix them or raise the limit. "
                f"Last: {state.unreadable[-1]}"
            )
