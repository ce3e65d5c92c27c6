"""The JSON Lines files of a run: ``metrics.jsonl``, ``eval.jsonl``, ``spikes.jsonl``.

Lines are appended without a sync. Each checkpoint has a copy of the lines up to its step (``logs/NAME.gz``, synced and
listed in the manifest), so they are as durable as the checkpoint that a run resumes from.
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

Lines = list[tuple[int, bytes]]  # step and line, including the newline
NO_FILE = -1  # size of a broken link or a folder
MAX_RANGES = 8  # maximum ranges of steps in a message


class JsonLines:
    """A file with one JSON object per line, each with its ``step``: at most one per step, or with ``every_step``
    exactly one. One process writes it, after :meth:`rewind`; any process may :meth:`read` it."""

    def __init__(self, path: Path, every_step: bool = False):
        self.path, self.every_step = path, every_step
        self._size = 0  # expected size of the file
        self._packer: Any = None
        self._packed = bytearray()

    def rewind(self, step: int, checkpoint: Path | None = None) -> None:
        """Truncate the file to the lines up to ``step``, from which training continues, and restore missing or damaged
        lines from the copy in ``checkpoint``. Logs what was restored and what is lost. Lines of steps before ``step``
        that are not in the copy do not belong to the run and are removed."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        saved_at = checkpoint and checkpoint / LOGS / f"{self.path.name}.gz"  # older versions have none
        copy = gzip.decompress(saved_at.read_bytes()) if saved_at and saved_at.is_file() else None
        copied = dict(_parse(copy or b"")[0])
        order, unreadable = _parse(content, {line: number for number, line in copied.items()})
        written, saved = dict(order), {number: line for number, line in copied.items() if number <= step}
        kept = {number: line for number, line in written.items() if number <= step} | saved
        foreign = set() if copy is None else {number for number in kept if number < step} - saved.keys()
        kept = {number: line for number, line in kept.items() if number not in foreign}
        lines = b"".join(kept[number] for number in sorted(kept))
        source = "no checkpoint" if checkpoint is None else checkpoint.name
        messages = []
        if unreadable:
            messages.append(f"removed {len(unreadable)} unreadable line(s), the first is line {unreadable[0]}")
        if restored := [number for number, line in saved.items() if written.get(number) != line]:
            messages.append(f"restored from {source}: lines of step {ranges(restored)}")
        if foreign:
            messages.append(f"removed because {source} does not have them: lines of step {ranges(foreign)}")
        if self.every_step and (lost := set(range(1, step + 1)) - kept.keys()):
            messages.append(f"lost because {source} has no copy of them: lines of step {ranges(lost)}")
        if len(written) < len(order) or sorted(written) != list(written):
            messages.append("sorted, with one line per step")
        if self._current_size() == NO_FILE:
            messages.append("was not a file; replaced by one")
        if messages:
            log.warning("%s: %s", self.path, "; ".join(messages))
        if repeated := [number for number in written if number > step]:
            log.info("%s: removed the lines of step %s; training continues after step %d",
                     self.path, ranges(repeated), step)  # fmt: skip
        if lines != content or self._current_size() == NO_FILE:
            replace_synced(self.path, lines)
        self._size, self._packer = len(lines), zlib.compressobj(1, wbits=31)  # 31: gzip format
        self._packed = bytearray(self._packer.compress(lines))

    def append(self, record: dict[str, Any], sync: bool = False) -> None:
        """Append a line, atomically; with ``sync``, also sync it to disk.

        Raises:
            OSError: the line cannot be written; the file keeps its previous content.
        """
        assert self._packer is not None, "rewind first"
        line = json.dumps(record).encode() + b"\n"
        if self._size != self._current_size():
            log.warning("%s was changed or removed during training; writing it again", self.path)
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
        """All lines so far as gzip, for a checkpoint: what was written, even if the file was changed since."""
        assert self._packer is not None, "rewind first"
        return bytes(self._packed) + self._packer.copy().flush()

    def read(self) -> list[dict[str, Any]]:
        """The readable lines, sorted by step."""
        lines = dict(_parse(self.path.read_bytes())[0]) if self.path.is_file() else {}
        return [json.loads(lines[number]) for number in sorted(lines)]

    def _current_size(self) -> int:
        """Size of the file; 0 if it does not exist."""
        if self.path.is_file():
            return self.path.stat().st_size
        return NO_FILE if self.path.is_symlink() or self.path.exists() else 0


def _parse(content: bytes, known: Mapping[bytes, int] = MappingProxyType({})) -> tuple[Lines, list[int]]:
    """Split into lines with their steps, and line numbers of damaged ones; lines in ``known`` need no parsing."""
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
    except (ValueError, RecursionError):  # includes UnicodeDecodeError; deeply nested brackets
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if type(step) is int and step > 0 else None


def ranges(steps: Iterable[int]) -> str:
    """Format steps as ranges: ``1 to 3, 5``."""
    merged: list[list[int]] = []
    for step in sorted(steps):
        if merged and step == merged[-1][1] + 1:
            merged[-1][1] = step
        else:
            merged.append([step, step])
    words = [f"{first} to {last}" if last > first else str(first) for first, last in merged]
    return ", ".join(words[:MAX_RANGES]) + (f" and {len(words) - MAX_RANGES} more" if len(words) > MAX_RANGES else "")
