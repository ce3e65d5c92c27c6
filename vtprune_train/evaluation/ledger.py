"""Results that survive a kill: one line a sample, on disk as soon as it is done, and read again at the next start."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vtprune_train.files.disk import replace_synced

SETTINGS = "settings.json"
SAMPLES = "samples.jsonl"


@contextmanager
def open_ledger(folder: Path, settings: dict[str, Any]) -> Iterator[Ledger]:
    """The ledger in ``folder``, made where it is missing, for this process alone.

    Raises:
        ValueError: it cannot be made, another process has it open, or see :class:`Ledger`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(str(folder / ".lock"), timeout=0):
            yield Ledger(folder, settings)
    except Timeout as error:
        raise ValueError(f"--out {folder}: another process is writing to it") from error
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot be written to ({error})") from error


class Ledger:
    """The folder of one evaluation: ``settings.json`` says of what, ``samples.jsonl`` holds what is done.

    Args:
        folder: is there.
        settings: plain data; the same on every start that continues this evaluation.

    Raises:
        ValueError: the folder holds results of other settings, or a line in the middle is broken.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self.path = folder / SAMPLES
        self._check(settings)
        self.done: dict[str, dict[str, Any]] = {line["key"]: line for line in self._read()}

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Write finished samples (each with its ``key``) to the disk."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        self.done.update({line["key"]: line for line in lines})

    def write(self, name: str, values: dict[str, Any]) -> None:
        """A whole file of the folder, or none."""
        replace_synced(self.folder / name, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())

    def _check(self, settings: dict[str, Any]) -> None:
        settings = json.loads(json.dumps(settings))
        path = self.folder / SETTINGS
        if not path.is_file():
            if self.path.exists():
                raise ValueError(f"--out {self.folder} holds {SAMPLES} without {SETTINGS}; use another folder")
            self.write(SETTINGS, settings)
            return
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); restore it, or use another --out") from error
        changed = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
        if changed:
            lines = "; ".join(f"{key}: there {before.get(key)!r}, now {settings.get(key)!r}" for key in changed)
            raise ValueError(
                f"--out {self.folder} holds an evaluation with other settings ({lines}); set them back to continue it, "
                "or use another folder"
            )

    def _read(self) -> list[dict[str, Any]]:
        """The lines on disk; a half-written last one is cut off."""
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            os.truncate(self.path, whole)
        lines = []
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{self.path}, line {number}: not JSON ({error}); use another --out") from error
        return lines
