"""A checkpoint's files, written beside training: host copies first, then a thread of every rank.

No thread takes part in a collective. Each rank's thread writes and hashes its own files and says so in a small
``rank_00000.json``; rank 0's thread waits for those of all ranks and publishes.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.utils.serialization import config as serialization

from vtprune_train.files.disk import naming
from vtprune_train.training.memory.pinned import Arena

POLL_SECONDS = 0.02
Entries = dict[str, dict[str, Any]]
Files = list[tuple[Path, Any]]


class HostCopies:
    """Copies of state in host memory (pinned beside a GPU), the same memory for every save."""

    def __init__(self) -> None:
        self._arenas = {on_gpu: Arena(lock=on_gpu) for on_gpu in (False, True)}
        self._taken: dict[tuple[Any, ...], torch.Tensor] = {}
        self._sources: list[torch.Tensor] = []

    def begin(self) -> None:
        """Forget what was copied, keep the memory: copies made before are overwritten."""
        self._taken, self._sources = {}, []
        for arena in self._arenas.values():
            arena.begin()

    def copy(self, value: Any) -> Any:
        """``value`` with every tensor in nested dicts, lists and tuples copied to the host, and everything else so
        that later changes do not reach it. One tensor met twice (tied weights) is copied once."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            made: dict[Any, Any] = OrderedDict() if isinstance(value, OrderedDict) else {}
            made.update((key, self.copy(item)) for key, item in value.items())
            if hasattr(value, "_metadata"):  # of a module's state
                made._metadata = copy.deepcopy(value._metadata)  # type: ignore[attr-defined]
            return made
        if isinstance(value, list):
            return [self.copy(item) for item in value]
        if type(value) is tuple:
            return tuple(self.copy(item) for item in value)
        return copy.deepcopy(value)

    def finish(self) -> None:
        """Wait until what :meth:`copy` began is in the host's memory."""
        if any(source.is_cuda for source in self._sources):
            torch.cuda.synchronize()
        self._sources = []
        for arena in self._arenas.values():
            arena.trim()

    def num_bytes(self) -> int:
        """Size of what was copied since :meth:`begin`."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._taken.values())

    def _tensor(self, source: torch.Tensor) -> torch.Tensor:
        source = source.detach()
        key = (source.data_ptr(), source.dtype, tuple(source.shape), tuple(source.stride()), str(source.device))
        if source.numel() and key in self._taken:
            return self._taken[key]
        if not source.numel():
            return source.cpu().clone()
        target = self._arenas[source.is_cuda].cut(source)
        target.copy_(source, non_blocking=source.is_cuda)
        self._taken[key] = target
        self._sources.append(source)  # alive until copied, so that no other tensor gets its address
        return target


def collect_files(engine: Any, folder: Path, tag: str, copies: HostCopies, trained_only: bool) -> Files:
    """What DeepSpeed would write into ``folder`` now, as host copies; all ranks call this together. Nothing is written
    (but what an optimizer on NVMe keeps in files of its own, which DeepSpeed copies).

    Args:
        engine: DeepSpeed's.
        folder: the checkpoint's.
        tag: the folder inside it.
        copies: where the host's memory comes from.
        trained_only: leave frozen parameters out.
    """
    files: Files = []

    def keep(state_dict: Any, path: str) -> None:
        files.append((Path(path), copies.copy(state_dict)))

    writer = engine.checkpoint_engine
    writer.save = keep
    engine._copy_recovery_script = lambda save_path: None  # a script that rank 0 alone would write, and could fail at
    try:
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=trained_only)
    finally:
        del writer.save, engine._copy_recovery_script
    return files


class HashingFile:
    """A file that hashes what is written to it, and lets other threads work while it does."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += len(data)
        try:
            return self.file.write(data)
        except OSError as error:  # PyTorch's writer would hide it behind one of its own
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_file(path: Path, state: Any) -> dict[str, Any]:
    """Serialise as ``torch.save`` does; on disk when this returns. Returns the manifest's entry."""
    with naming(path), path.open("wb") as file:
        hashing = HashingFile(file)
        # Every file has its SHA-256: a checksum of each tensor beside it would only hold the interpreter's lock.
        with serialization.patch(  # type: ignore[attr-defined]
            "save.compute_crc32", False
        ):
            try:
                torch.save(state, hashing)  # type: ignore[arg-type]
            except RuntimeError as error:
                raise hashing.error or error from None
        file.flush()
        os.fsync(file.fileno())
    return {"size": hashing.size, "sha256": hashing.digest.hexdigest()}


class Save:
    """One checkpoint on its way to disk, as one rank sees it.

    Args:
        partial: the folder that is being filled.
        write: writes this rank's files into it and returns the manifest's entries.
        publish: on rank 0, what makes the folder a checkpoint once all ranks' files are there.
        rank, world_size: this rank, and how many there are.
    """

    def __init__(
        self,
        partial: Path,
        write: Callable[[], Entries],
        publish: Callable[[Entries], None],
        rank: int,
        world_size: int,
    ):
        self.partial, self.error = partial, None
        self.written, self.cancelled = threading.Event(), threading.Event()
        self._write, self._publish, self._rank, self._world_size = write, publish, rank, world_size
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)

    error: BaseException | None

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
