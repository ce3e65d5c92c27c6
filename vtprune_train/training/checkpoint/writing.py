"""Writes a checkpoint's files in a thread of every rank while training continues.

The threads use no collectives. Each rank's thread writes and hashes its files and then writes a small
``rank_00000.json``; rank 0's thread waits for those of all ranks and publishes the checkpoint.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.serialization import config as serialization

from vtprune_train.files.checksums import HashedFile
from vtprune_train.files.disk import naming
from vtprune_train.training.distributed import rank, world_size

POLL_SECONDS = 0.02
Entries = dict[str, dict[str, Any]]


def write_file(path: Path, state: Any) -> dict[str, Any]:
    """Write a file in the format of ``torch.save`` and sync it to disk. Returns its manifest entry."""
    # The file gets a SHA-256; CRCs of its tensors would only take time and hold the GIL.
    unsummed = serialization.patch("save.compute_crc32", False)  # type: ignore[attr-defined]
    with naming(path), HashedFile(path) as file, unsummed:
        try:
            torch.save(state, file)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise file.error or error from None
    return {"size": file.size, "sha256": file.sha256.hexdigest()}


class Save:
    """A save in progress on one rank.

    ``write`` writes this rank's files to the folder ``partial`` and returns their manifest entries. On rank 0,
    ``publish`` turns the folder into a checkpoint once the files of all ranks exist.
    """

    def __init__(self, partial: Path, write: Callable[[], Entries], publish: Callable[[Entries], None]):
        self.partial = partial
        self.error: BaseException | None = None
        self.written, self.cancelled = threading.Event(), threading.Event()
        self._write, self._publish, self._rank, self._world_size = write, publish, rank(), world_size()
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, seconds: float | None = None) -> bool:
        """Wait for this rank's part to end, on rank 0 including publishing; false on timeout."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            entries = self._write()
            _mark_written(self.partial, self._rank, entries)
            self.written.set()
            if self._rank == 0 and self._all_parts(entries):
                self._publish(entries)
        except BaseException as error:  # CheckpointFolder raises it on all ranks at the next step
            self.error = error
        finally:
            self.written.set()

    def _all_parts(self, entries: Entries) -> bool:
        """Collect the other ranks' entries; false if the save was cancelled."""
        for other in range(self._world_size):
            path = part_path(self.partial, other)
            while not path.is_file():
                if self.cancelled.wait(POLL_SECONDS):
                    return False
            entries.update(json.loads(path.read_text()))
            path.unlink()
        return True


def part_path(partial: Path, rank: int) -> Path:
    """The file that a rank writes after its other files."""
    return partial / f"rank_{rank:05d}.json"


def _mark_written(partial: Path, rank: int, entries: Entries) -> None:
    path = part_path(partial, rank)
    with naming(path):
        path.with_suffix(".tmp").write_text(json.dumps(entries))
    path.with_suffix(".tmp").rename(path)
