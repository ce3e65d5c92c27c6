"""A checkpoint's files, written while training goes on, by a thread of every rank.

No thread takes part in a collective. Each rank's thread writes and hashes its own files and says so in a small
``rank_00000.json``; rank 0's thread waits for those of all ranks and publishes.
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
    """Serialise as ``torch.save`` does; on disk when this returns. Returns the manifest's entry."""
    # Every file has its SHA-256: a checksum of each tensor beside it would only hold the interpreter's lock.
    unsummed = serialization.patch("save.compute_crc32", False)  # type: ignore[attr-defined]
    with naming(path), HashedFile(path) as file, unsummed:
        try:
            torch.save(state, file)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise file.error or error from None
    return {"size": file.size, "sha256": file.sha256.hexdigest()}


class Save:
    """One checkpoint on its way to disk, as one rank sees it.

    ``write`` writes this rank's files into the folder ``partial`` and returns the manifest's entries; on rank 0
    ``publish`` makes the folder a checkpoint once all ranks' files are there.
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
        """Wait for this rank's part (and on rank 0 the publishing) to end; false if it takes longer."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            entries = self._write()
            _say_written(self.partial, self._rank, entries)
            self.written.set()
            if self._rank == 0 and self._all_parts(entries):
                self._publish(entries)
        except BaseException as error:  # told to all ranks at the next step by CheckpointFolder
            self.error = error
        finally:
            self.written.set()

    def _all_parts(self, entries: Entries) -> bool:
        """Collect the other ranks' entries; false if the save was cancelled meanwhile."""
        for other in range(self._world_size):
            path = part_path(self.partial, other)
            while not path.is_file():
                if self.cancelled.wait(POLL_SECONDS):
                    return False
            entries.update(json.loads(path.read_text()))
            path.unlink()
        return True


def part_path(partial: Path, rank: int) -> Path:
    """Where a rank says that its files are written."""
    return partial / f"rank_{rank:05d}.json"


def _say_written(partial: Path, rank: int, entries: Entries) -> None:
    path = part_path(partial, rank)
    with naming(path):
        path.with_suffix(".tmp").write_text(json.dumps(entries))
    path.with_suffix(".tmp").rename(path)
