"""Builds the table of one source: measures its records in parallel, piece by piece, and joins the pieces into columns.

A finished piece is a file with a checksum (see :mod:`vtprune_train.files.checksums`) in a folder beside the table. An
interrupted build continues from its finished pieces.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import multiprocessing
import os
import pickle
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from itertools import chain, islice
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vtprune_train.data.measure import FINE, NO_IMAGE, RECORD_COLUMNS, SPAN_COLUMNS, Measure, measure_piece
from vtprune_train.data.sources import open_reader
from vtprune_train.data.sources.base import Piece, Reader
from vtprune_train.files.checksums import SummedFile, read_sealed, seal
from vtprune_train.files.disk import publish, remove
from vtprune_train.processes.children import live_with_parent, signals_blocked

log = logging.getLogger(__name__)

VERSION = 6  # of the format and content of columns
WORTH_PROCESSES = 4  # pieces; fewer are measured faster without worker processes
SECONDS_BETWEEN_LINES = 30
KEPT = ("at", "size", "text", "supervised", "state", "content")
STARTS = {"span_starts": "num_spans", "id_starts": "id_size"}
BUCKETS = 16


def build_table(
    folder: Path, files: Sequence[Path], stamps: Sequence[list[Any]], measure: Measure, workers: int
) -> None:
    """Build the table of ``files`` in ``folder``, using pieces that an interrupted build finished.

    Args:
        stamps: path and stamp of each file; pieces of files with other stamps are removed.

    Raises:
        ValueError: a file cannot be read, or there is no record; the message names the file.
    """
    state = hashlib.sha256(json.dumps([VERSION, stamps]).encode()).hexdigest()[:8]
    building = folder.with_name(f"{folder.name}.{state}.building")
    remove_builds(folder, keep=building)
    if not building.is_dir():
        remove(building)
        building.mkdir(parents=True)
    pieces = _build_pieces(building, files, measure, workers)
    publish(_assemble(building, pieces, stamps, measure), folder)
    remove_builds(folder)


def remove_builds(folder: Path, keep: Path | None = None) -> None:
    """Remove the folders of unfinished builds of a table."""
    for path in folder.parent.glob(f"{folder.name}.*building"):
        if path != keep:
            remove(path)


class _Work(NamedTuple):
    """A piece of a file and the target of its columns."""

    file_number: int
    file: Path
    piece: Piece
    target: Path

    @property
    def identity(self) -> str:
        return f"{self.target.parent.name} {self.target.name} {self.piece.start} {self.piece.stop}"

    def load(self) -> Mapping[str, np.ndarray]:
        """The columns of the finished piece; raises ``RuntimeError`` if it was damaged after it was checked or
        written."""
        try:
            return np.load(io.BytesIO(read_sealed(self.target, self.identity)))
        except (OSError, ValueError) as error:
            raise RuntimeError(
                f"{self.target}, a piece of the index, was damaged after it was written ({error}); start again to "
                "rebuild it, and check the disk"
            ) from error

    def is_finished(self) -> bool:
        """Whether the piece has been measured; logs a file that cannot be used."""
        try:
            read_sealed(self.target, self.identity)
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as error:
            log.warning("%s, a piece of the index, cannot be used (%s); measuring it again", self.target, error)
            return False
        return True


def _build_pieces(building: Path, files: Sequence[Path], measure: Measure, workers: int) -> list[_Work]:
    """Measure the unfinished pieces and return all pieces, in order."""
    every: list[_Work] = []
    num_finished = 0

    def missing() -> Iterator[_Work]:
        nonlocal num_finished
        for number, file in enumerate(files):
            for piece in open_reader(file, measure.bounds.record, measure.reader).pieces():
                work = _Work(number, file, piece, building / f"{len(every):07d}.npz")
                every.append(work)
                if work.is_finished():
                    num_finished += 1
                else:
                    yield work

    todo = missing()
    first = list(islice(todo, WORTH_PROCESSES))
    if num_finished:
        log.info("%s: continuing with %d finished piece(s) of an earlier run", files[0].name, num_finished)
    if workers > 1 and len(first) == WORTH_PROCESSES:
        _measure_in_processes(chain(first, todo), measure, workers, files[0].name)
    else:
        worker = _Worker(measure)
        for work in chain(first, todo):
            worker(work)
    return every


class _Worker:
    """Measures pieces and keeps the last file open."""

    def __init__(self, measure: Measure):
        self.measure = measure
        self._reader: Reader | None = None

    def __call__(self, work: _Work) -> None:
        if self._reader is None or self._reader.path != work.file:
            self._reader = open_reader(work.file, self.measure.bounds.record, self.measure.reader)
        measure_piece(self.measure, self._reader, work.piece, work.target, work.identity)


class _SentMeasure:
    """Passes a measure to worker processes in an unnamed temporary file. In the pickled arguments of a process it would
    exceed the buffer of a pipe, and a process that is killed while it starts would block its parent forever."""

    def __init__(self, measure: Measure):
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (stays open while workers may start)
        pickle.dump(measure, self._file)
        self._file.flush()

    def __reduce__(self) -> Any:
        return _receive_measure, (DupFd(self._file.fileno()),)


def _receive_measure(descriptor: Any) -> Measure:
    number = descriptor.detach()
    return pickle.loads(os.pread(number, os.fstat(number).st_size, 0))  # processes share the file position


_worker: _Worker  # of a worker process


def _start_process(measure: Measure) -> None:
    """Initialize a worker process."""
    global _worker
    live_with_parent()
    _worker = _Worker(measure)


def _measure(work: _Work) -> None:
    _worker(work)


class _Process(SpawnProcess):
    """A worker process. It ignores SIGTERM, so the pool must end it by SIGKILL."""

    def terminate(self) -> None:
        self.kill()


class _Context(SpawnContext):
    Process = _Process


def _measure_in_processes(todo: Iterator[_Work], measure: Measure, workers: int, name: str) -> None:
    # Spawned, not forked: the training process already has threads, and a fork would copy their locks.
    sent: Any = _SentMeasure(measure)  # unpickled as a Measure
    started = last_line = time.monotonic()
    done = 0
    with ProcessPoolExecutor(workers, _Context(), _start_process, (sent,)) as pool:
        try:
            running = {_submitted(pool, work) for work in islice(todo, 2 * workers)}
            while running:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                done += len(finished)
                running |= {_submitted(pool, work) for work in islice(todo, len(finished))}
                if time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                    last_line = time.monotonic()
                    log.info("indexing %s: %d pieces in %.0f s", name, done, last_line - started)
        except BrokenProcessPool as error:
            for process in multiprocessing.active_children():
                if isinstance(process, _Process):  # the pool does not end one that was just being started
                    process.kill()
            raise RuntimeError(
                f"a process that indexed {name} was killed, perhaps because memory ran out; start again with fewer "
                "data.workers (finished pieces are kept)"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _submitted(pool: ProcessPoolExecutor, work: _Work) -> Future[None]:
    """Submit a piece. A process that the pool starts for it blocks signals until it ignores them."""
    try:
        with signals_blocked():
            return pool.submit(_measure, work)
    except (OSError, ValueError) as error:  # the pool is breaking and has closed its pipes
        raise BrokenProcessPool(str(error)) from error


class ColumnFile(SummedFile):
    """A ``.npy`` file of ``length`` values, written sequentially. On a full disk this raises an error that names the
    file; writing through a memory mapping would kill the process."""

    def __init__(self, path: Path, dtype: Any, length: int):
        super().__init__(path)
        self.dtype = np.dtype(dtype)
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(self, header)  # type: ignore[arg-type]  # it only calls write

    def append(self, values: np.ndarray) -> None:
        self.write(values.astype(self.dtype).tobytes())


def _assemble(building: Path, pieces: Sequence[_Work], stamps: Sequence[list[Any]], measure: Measure) -> Path:
    """Join the columns of the pieces in a folder that becomes the table, with one piece in memory at a time."""
    folder = building / "table"
    remove(folder)
    folder.mkdir()
    first, num_records, num_images, id_bytes = _sizes(pieces, len(stamps))
    if not num_records:
        raise ValueError(
            f"data file {stamps[0][0]}{' and the others contain' if stamps[1:] else ' contains'} no record"
        )
    lengths = {**dict.fromkeys(SPAN_COLUMNS, num_images), **dict.fromkeys(STARTS, num_records + 1), "ids": id_bytes}
    dtypes = {**RECORD_COLUMNS, **dict.fromkeys(SPAN_COLUMNS, np.int32), **dict.fromkeys(STARTS, np.int64)}
    with ExitStack() as stack:
        columns: dict[str, ColumnFile] = {
            name: stack.enter_context(
                ColumnFile(folder / f"{name}.npy", dtypes.get(name, np.uint8), lengths.get(name, num_records))
            )
            for name in (*KEPT, *SPAN_COLUMNS, *STARTS, "ids")
        }
        hashes = stack.enter_context(ColumnFile(building / "id_hash.npy", np.uint64, num_records))
        errors = stack.enter_context(SummedFile(folder / "errors.jsonl"))
        counts = _join(pieces, columns, hashes, errors)
    manifest = {
        "version": VERSION,
        "made_with": measure.fingerprint(),
        "records": num_records,
        "pictures": num_images,
        "letters": id_bytes,
        **counts,
        "generation": 0,
        **_duplicates(np.load(hashes.path, mmap_mode="r")),
        "files": [[*entry, start] for entry, start in zip(stamps, first, strict=True)],
    }
    seal(folder, manifest, {file.path.name: file.sums for file in (*columns.values(), errors)})
    return folder


def _join(
    pieces: Sequence[_Work], columns: Mapping[str, ColumnFile], hashes: ColumnFile, errors: SummedFile
) -> dict[str, Any]:
    """Append each piece to the columns. Returns the counts of the manifest."""
    unread: Counter[str] = Counter()
    row = bad = doubtful = 0
    ends = dict.fromkeys(STARTS, 0)
    for name in STARTS:
        columns[name].append(np.zeros(1, dtype=np.int64))
    for work in pieces:
        piece = work.load()
        for name in (*KEPT, *SPAN_COLUMNS, "ids"):
            columns[name].append(piece[name])
        for name, lengths in STARTS.items():
            starts = ends[name] + np.cumsum(piece[lengths], dtype=np.int64)
            columns[name].append(starts)
            ends[name] = int(starts[-1]) if len(starts) else ends[name]
        hashes.append(piece["id_hash"])
        state = piece["state"]
        bad += int((state != FINE).sum())
        doubtful += int((state == NO_IMAGE).sum())
        unread.update(json.loads(piece["unread"].tobytes()))
        entries = map(json.loads, piece["errors"].tobytes().decode().splitlines())
        errors.write("".join(json.dumps({**entry, "row": entry["row"] + row}) + "\n" for entry in entries).encode())
        row += len(state)
    return {"bad": bad, "doubtful": doubtful, "unread": dict(sorted(unread.items()))}


def _sizes(pieces: Sequence[_Work], num_files: int) -> tuple[list[int], int, int, int]:
    """The first record of each file, and the numbers of records, images and bytes of ids in all pieces."""
    of_file = np.zeros(num_files, dtype=np.int64)
    num_images = id_bytes = 0
    for work in pieces:
        piece = work.load()
        of_file[work.file_number] += len(piece["at"])
        num_images += len(piece["height"])
        id_bytes += len(piece["ids"])
    return (np.cumsum(of_file) - of_file).tolist(), int(of_file.sum()), num_images, id_bytes


def _duplicates(hashes: np.ndarray) -> dict[str, Any]:
    """The number of records that have the id of an earlier record, and the rows of one such pair. Works on a share of
    the hashes at a time."""
    count, rows = 0, None
    for bucket in range(BUCKETS):
        in_bucket = np.sort(hashes[(hashes % BUCKETS == bucket) & (hashes != 0)])
        repeated = np.flatnonzero(in_bucket[1:] == in_bucket[:-1])
        count += len(repeated)
        if rows is None and len(repeated):
            rows = np.flatnonzero(hashes == in_bucket[repeated[0]])[:2].tolist()
    return {"duplicates": count, "duplicate_rows": rows}
