"""TensorBoard's event files: reads which scalars they show, and hides and rewrites steps on resume."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vtprune_train.training.checkpoint.json_lines import ranges

log = logging.getLogger(__name__)

Scalar = tuple[str, float, int]  # tag, value, step


def continue_after(step: int, writer: Any, events: list[Scalar]) -> None:
    """Hide what TensorBoard has after ``step``. If its files lack values of an earlier step or have other ones, write
    ``events`` again from that step on. ``events`` end at ``step``."""
    folder = Path(writer.log_dir)
    lacking = steps_lacking(events, scalars_shown(folder))
    first = lacking[0] if lacking else step + 1
    hide_from(writer, first)
    if not lacking:
        return
    log.warning(
        "%s lacks step %s; writing the scalars from step %d on again from metrics.jsonl and eval.jsonl, without images",
        folder, ranges(lacking), first,
    )  # fmt: skip
    for event in events:
        if event[2] >= first:
            writer.add_scalar(*event)
    writer.flush()


def hide_from(writer: Any, step: int) -> None:
    """Make TensorBoard hide everything written so far for ``step`` and later steps."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    for _ in range(2):  # TensorBoard treats the first START event as the start of the run
        writer.file_writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
    writer.flush()


def steps_lacking(events: list[Scalar], shown: dict[int, dict[str, float]]) -> list[int]:
    """Steps in ``events`` whose values TensorBoard lacks or shows with other float32 values, in order."""
    with np.errstate(over="ignore"):
        values = np.array([value for _, value, _ in events], np.float64).astype(np.float32).tolist()
    incomplete = set()
    for (tag, _, step), value in zip(events, values, strict=True):
        in_file = shown.get(step, {}).get(tag)
        if in_file != value and (in_file is None or in_file == in_file or value == value):  # NaN is shown as NaN
            incomplete.add(step)
    return sorted(incomplete)


def scalars_shown(folder: Path) -> dict[int, dict[str, float]]:
    """The scalars that TensorBoard shows for each step, by tag, read from the event files in ``folder``."""
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
    """The events of a file up to its end or the first damaged one. TensorBoard's own reader takes twenty times as
    long, because it computes checksums in Python."""
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
