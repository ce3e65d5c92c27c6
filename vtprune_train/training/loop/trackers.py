"""The numbers of ``metrics.jsonl`` and ``eval.jsonl`` in TensorBoard and DeepSpeed's other monitors.

On resume TensorBoard hides what came after the checkpoint, and what its files lack or show wrongly is written again.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vtprune_train.training.checkpoint.json_lines import JsonLines, ranges
from vtprune_train.training.engine.monitors import Monitors, Scalar
from vtprune_train.training.loop.callbacks import eval_scalars, only_warning
from vtprune_train.training.loop.trainer import Callback, Trainer

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

SHOWN = ("loss", "grad_norm", "tokens_per_second", "step_time", "data_wait", "token_accuracy")


def train_scalars(record: dict[str, Any]) -> list[Scalar]:
    """What is shown of a line of ``metrics.jsonl``."""
    events = [(f"train/{name}", record[name], record["step"]) for name in SHOWN if record.get(name) is not None]
    events += [(f"train/keep_{i}", share, record["step"]) for i, share in enumerate(record.get("keep", ()), 1)]
    if record.get("consistency_loss") is not None:
        events.append(("train/consistency_loss", record["consistency_loss"], record["step"]))
    return events + [
        (f"learning_rate/{part}", rate, record["step"]) for part, rate in record.get("learning_rates", {}).items()
    ]


class Trackers(Callback):
    """The run's numbers, to DeepSpeed's monitors; after the callbacks that bring their files in order on a resume."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir

    def on_start(self, trainer: Trainer) -> None:
        if (board := trainer.engine.monitors.tensorboard) is not None:
            with only_warning(board.log_dir):
                self._continue(board, trainer.engine.monitors, trainer.state.step)

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        if trainer.engine.monitors.enabled:
            trainer.engine.monitors.write(train_scalars(record))

    def _continue(self, board: SummaryWriter, monitors: Monitors, step: int) -> None:
        """Have TensorBoard show the steps up to ``step`` alone, and write again those from the first whose scalars its
        files lack or show with other values."""
        folder = Path(board.log_dir)
        events = [event for line in JsonLines(self.run_dir / "metrics.jsonl").read() for event in train_scalars(line)]
        events += [event for line in JsonLines(self.run_dir / "eval.jsonl").read() for event in eval_scalars(line)]
        events = [event for event in events if isinstance(event[1], int | float)]  # a damaged line without a copy
        lacking = steps_lacking(events, scalars_shown(folder))
        first = lacking[0] if lacking else step + 1
        hide_from(board, first)
        if not lacking:
            return
        log.warning("%s lacks step %s: the scalars from step %d on are written again from metrics.jsonl and eval.jsonl "
                    "(pictures are not)", folder, ranges(lacking), first)  # fmt: skip
        monitors.write_tensorboard([event for event in events if event[2] >= first])


def hide_from(writer: Any, step: int) -> None:
    """Have TensorBoard hide everything of ``step`` and later that was written before."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    for _ in range(2):  # the first one that TensorBoard meets is that of a run's beginning, which hides nothing
        writer.file_writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
    writer.flush()


def steps_lacking(events: list[Scalar], shown: dict[int, dict[str, float]]) -> list[int]:
    """Steps of ``events`` that are not shown whole, with the same values in float32; in order."""
    with np.errstate(over="ignore"):
        values = np.array([value for _, value, _ in events], np.float64).astype(np.float32).tolist()
    lacking = set()
    for (tag, _, step), value in zip(events, values, strict=True):
        found = shown.get(step, {}).get(tag)
        if found != value and (found is None or found == found or value == value):  # NaN is shown as NaN
            lacking.add(step)
    return sorted(lacking)


def scalars_shown(folder: Path) -> dict[int, dict[str, float]]:
    """What TensorBoard would show of each step, by tag, by the event files in a folder."""
    from tensorboard.compat.proto.event_pb2 import SessionLog

    shown: dict[int, dict[str, float]] = {}
    for path in sorted(path for path in folder.glob("*tfevents*") if path.is_file()):
        for event in _events(path):
            if event.session_log.status == SessionLog.START:
                shown = {step: scalars for step, scalars in shown.items() if step < event.step}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    shown.setdefault(event.step, {})[sys.intern(value.tag)] = value.simple_value
    return shown


def _events(path: Path) -> Iterator[Any]:
    """The events of a file up to its end or the first that is damaged. TensorBoard's own reader takes twenty times as
    long, for checksums in Python."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    content, position = path.read_bytes(), 0
    while position < len(content):  # a record: its length (8 bytes), a checksum (4), the event, a checksum (4)
        begin = position + 12
        end = begin + int.from_bytes(content[position : position + 8], "little")
        if end + 4 > len(content):
            return
        try:
            yield Event.FromString(content[begin:end])
        except DecodeError:
            return
        position = end + 4
