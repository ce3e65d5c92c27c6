"""``metrics.jsonl`` and other JSON Lines files of a run."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from vtprune_train.data.plan.planner import data_digest
from vtprune_train.training import distributed as ranks
from vtprune_train.training.checkpoint.json_lines import JsonLines
from vtprune_train.training.loop.callback import Callback, Trainer


class LineFile(Callback):
    """A JSON Lines file that every checkpoint copies, even if this run appends nothing (evaluation is off)."""

    def __init__(self, file: JsonLines):
        self.file = file

    def on_start(self, trainer: Trainer) -> None:
        ranks.from_rank_0(lambda: self.file.rewind(trainer.state.step, trainer.checkpoints.resumed))

    def files(self) -> list[JsonLines]:
        return [self.file]


class Metrics(LineFile):
    """Appends a line to ``metrics.jsonl`` after every step, with the time and a digest of the sample ids."""

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        if ranks.rank() == 0:
            ids = [trainer.collate.index.sample_id(sample) for sample in trainer.samples]
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            self.file.append({**metrics, "data_digest": data_digest(ids), "time": now})
