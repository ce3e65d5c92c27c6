"""The numbers of ``metrics.jsonl`` and ``eval.jsonl`` in TensorBoard and DeepSpeed's other monitors.

On resume TensorBoard hides what came after the checkpoint, and what its files lack is written again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune_train.training import distributed as ranks
from vtprune_train.training.callbacks import Callback, eval_scalars, only_warning
from vtprune_train.training.json_lines import JsonLines, ranges
from vtprune_train.training.monitors import Scalar

if TYPE_CHECKING:
    from vtprune_train.training.trainer import Trainer

log = logging.getLogger(__name__)

SHOWN = ("loss", "grad_norm", "tokens_per_second", "step_time", "data_wait", "token_accuracy")
IN_EVERY_STEP = "train/tokens_per_second"


def train_scalars(record: dict[str, Any]) -> list[Scalar]:
    """What is shown of a line of ``metrics.jsonl``."""
    events = [(f"train/{name}", record[name], record["step"]) for name in SHOWN if record[name] is not None]
    events += [(f"train/keep_{i}", share, record["step"]) for i, share in enumerate(record.get("keep", ()), 1)]
    if record.get("consistency_loss") is not None:
        events.append(("train/consistency_loss", record["consistency_loss"], record["step"]))
    return events + [(f"learning_rate/{part}", rate, record["step"]) for part, rate in record["learning_rates"].items()]


class Trackers(Callback):
    """The run's numbers, to DeepSpeed's monitors; after the callbacks that bring their files in order on a resume."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir

    def on_start(self, trainer: Trainer) -> None:
        if ranks.rank() or not trainer.engine.monitor.enabled:
            return
        if (board := trainer.engine.monitor.tb_monitor) is not None:
            with only_warning(board.summary_writer.log_dir):
                self._continue(board, trainer.state.step)

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        if ranks.rank() == 0 and trainer.engine.monitor.enabled:
            trainer.engine.monitor.write_events(train_scalars(record))

    def _continue(self, board: Any, step: int) -> None:
        """Have TensorBoard show the steps up to ``step`` alone, and write again those from the first that its files
        lack."""
        folder = Path(board.summary_writer.log_dir)
        trained = {line["step"]: line for line in JsonLines(self.run_dir / "metrics.jsonl").read()}
        lacking = sorted(trained.keys() - steps_shown(folder))
        first = lacking[0] if lacking else step + 1
        hide_from(board.summary_writer, first)
        if not lacking:
            return
        log.warning("%s lacks step %s: the scalars from step %d on are written again from metrics.jsonl and eval.jsonl "
                    "(pictures are not)", folder, ranges(lacking), first)  # fmt: skip
        for number in sorted(trained):
            if number >= first:
                board.write_events(train_scalars(trained[number]))
        for line in JsonLines(self.run_dir / "eval.jsonl").read():
            if line["step"] >= first:
                board.write_events(eval_scalars(line))


def hide_from(writer: Any, step: int) -> None:
    """Have TensorBoard hide everything of ``step`` and later that was written before."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    for _ in range(2):  # the first one that TensorBoard meets is that of a run's beginning, which hides nothing
        writer.file_writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
    writer.flush()


def steps_shown(folder: Path) -> set[int]:
    """Global steps whose scalars TensorBoard would show, by the event files in a folder."""
    from tensorboard.compat.proto.event_pb2 import SessionLog

    shown: set[int] = set()
    for path in sorted(folder.glob("*tfevents*")):
        for event in _events(path):
            if event.session_log.status == SessionLog.START:
                shown = {step for step in shown if step < event.step}
            elif any(value.tag == IN_EVERY_STEP for value in event.summary.value):
                shown.add(event.step)
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
