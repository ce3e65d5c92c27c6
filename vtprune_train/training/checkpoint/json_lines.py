"""What a run writes line by line: ``metrics.jsonl``, ``eval.jsonl``, ``spikes.jsonl``.

The files are appended to without a sync. Each checkpoint holds a copy of them up to its step (``logs/NAME.gz``, synced
and listed in its manifest like its other files), so the lines are as durable as the checkpoint that a run resumes from.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vtprune_train.files.disk import naming, replace_synced
from vtprune_train.training.checkpoint.manifest import LOGS

log = logging.getLogger(__name__)

Lines = list[tuple[int, bytes]]  # a step and its line, with the newline
NO_FILE = -1  # size of a link that leads nowhere, or of a folder
SHOWN = 8  # ranges of steps in a message


class JsonLines:
    """A file of one JSON object a line, each with its ``step``, at most one for each step; with ``every_step`` exactly
    one. One process writes it, after :meth:`rewind`; any may :meth:`read` it."""

    def __init__(self, path: Path, every_step: bool = False):
        self.path, self.every_step = path, every_step
        self._size = 0  # of the file
        self._packer: Any = None
        self._packed = bytearray()

    def rewind(self, step: int, checkpoint: Path | None = None) -> None:
        """Keep the lines up to ``step``, after which training continues from ``checkpoint``, and restore from its copy
        those that are missing or damaged; says what was restored, and what is lost. Lines of earlier steps that the
        copy lacks are not the run's, and are removed; one of ``step`` itself may have come after the checkpoint."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        saved_at = checkpoint and checkpoint / LOGS / f"{self.path.name}.gz"  # older versions wrote none
        copy = gzip.decompress(saved_at.read_bytes()) if saved_at and saved_at.is_file() else None
        copied = dict(_parse(copy or b"")[0])
        order, unreadable = _parse(content, {line: number for number, line in copied.items()})
        written, saved = dict(order), {number: line for number, line in copied.items() if number <= step}
        kept = {number: line for number, line in written.items() if number <= step} | saved
        foreign = set() if copy is None else {number for number in kept if number < step} - saved.keys()
        kept = {number: line for number, line in kept.items() if number not in foreign}
        lines = b"".join(kept[number] for number in sorted(kept))
        whose = "no checkpoint" if checkpoint is None else checkpoint.name
        told = []
        if unreadable:
            told.append(f"{len(unreadable)} unreadable line(s) removed, the first was line {unreadable[0]}")
        if restored := [number for number, line in saved.items() if written.get(number) != line]:
            told.append(f"restored from {whose}: the line(s) of step {ranges(restored)}")
        if foreign:
            told.append(f"removed, for {whose} does not hold them: the line(s) of step {ranges(foreign)}")
        if self.every_step and (lost := set(range(1, step + 1)) - kept.keys()):
            told.append(f"lost, for {whose} has no copy of them: the line(s) of step {ranges(lost)}")
        if len(written) < len(order) or sorted(written) != list(written):
            told.append("put in order, one line for each step")
        if self._found() == NO_FILE:
            told.append("it was no file, and is replaced by one")
        if told:
            log.warning("%s: %s", self.path, "; ".join(told))
        if repeated := [number for number in written if number > step]:
            log.info("%s: the line(s) of step %s are removed, training continues after step %d",
                     self.path, ranges(repeated), step)  # fmt: skip
        if lines != content or self._found() == NO_FILE:
            replace_synced(self.path, lines)
        self._size, self._packer = len(lines), zlib.compressobj(1, wbits=31)  # 31: as gzip writes it
        self._packed = bytearray(self._packer.compress(lines))

    def append(self, record: dict[str, Any], sync: bool = False) -> None:
        """Write a line, whole or not at all; with ``sync`` it is on disk when this returns.

        Raises:
            OSError: it cannot be written; names the file, which holds what it held before.
        """
        assert self._packer is not None, "rewind first"
        line = json.dumps(record).encode() + b"\n"
        if self._size != self._found():
            log.warning("%s was changed or removed while training was running; it is written again", self.path)
            replace_synced(self.path, gzip.decompress(self.copy()))
        with naming(self.path), self.path.open("ab", buffering=0) as file:
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[file.write(rest) :]
                if sync:
                    os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), self._size)
                raise
        self._packed += self._packer.compress(line)
        self._size += len(line)

    def copy(self) -> bytes:
        """All lines so far, compressed (gzip), for a checkpoint; of what was written, whatever became of the file."""
        assert self._packer is not None, "rewind first"
        return bytes(self._packed) + self._packer.copy().flush()

    def read(self) -> list[dict[str, Any]]:
        """The lines that can be read, by step."""
        lines = dict(_parse(self.path.read_bytes())[0]) if self.path.is_file() else {}
        return [json.loads(lines[number]) for number in sorted(lines)]

    def _found(self) -> int:
        """Size of the file, 0 if there is none."""
        if self.path.is_file():
            return self.path.stat().st_size
        return NO_FILE if self.path.is_symlink() or self.path.exists() else 0


def _parse(content: bytes, known: Mapping[bytes, int] = MappingProxyType({})) -> tuple[Lines, list[int]]:
    """The lines with their steps, in order, and the numbers of those that are damaged; ``known`` need no parsing."""
    lines: Lines = []
    unreadable = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        whole = line + b"\n"
        if (step := known[whole] if whole in known else _step_of(line)) is not None:
            lines.append((step, whole))
        elif line:
            unreadable.append(number)
    return lines, unreadable


def _step_of(line: bytes) -> int | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError too; brackets without an end
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if type(step) is int and step > 0 else None


def ranges(steps: Iterable[int]) -> str:
    """Steps in few words: ``1 to 3, 5``."""
    found: list[list[int]] = []
    for step in sorted(steps):
        if found and step == found[-1][1] + 1:
            found[-1][1] = step
        else:
            found.append([step, step])
    words = [f"{first} to {last}" if last > first else str(first) for first, last in found]
    return ", ".join(words[:SHOWN]) + (f" and {len(words) - SHOWN} more" if len(words) > SHOWN else "")
