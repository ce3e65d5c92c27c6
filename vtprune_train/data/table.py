"""The measured records of one source as columns on disk: built in parallel piece by piece, opened by memory mapping.

A table is a folder of ``.npy`` columns and a ``manifest.json``, which is written last. While it is built, finished
pieces lie in a folder beside it; a build that was cut off goes on from them.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vtprune_train.data.measure import (
    FINE,
    NO_PICTURE,
    RECORD_COLUMNS,
    SPAN_COLUMNS,
    Measure,
    Measured,
    measure_piece,
)
from vtprune_train.data.records import Conversation, default_id, normalize
from vtprune_train.data.sources import Piece, Place, Reader, open_reader, stamp
from vtprune_train.stops import STOPPING

log = logging.getLogger(__name__)

VERSION = 4  # of the columns and of what they count
WORTH_PROCESSES = 4  # pieces; fewer are measured before a process has started
SECONDS_BETWEEN_LINES = 30
KEPT = ("at", "size", "text", "supervised", "state", "content")
BUCKETS = 16


class Table:
    """The columns of a finished table; opening it reads the manifest alone.

    ``manifest`` holds ``records``, ``pictures``, ``bad``, ``doubtful``, ``unread`` (records that have each field which
    is not read), ``files`` (path, size, time, first record), ``generation``, ``duplicates`` and what the table was made
    with.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        self._columns: dict[str, np.ndarray] = {}
        self._readers: dict[int, Reader] = {}
        self._first = np.array([first for *_, first in self.manifest["files"]], dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest, "_first": self._first, "_columns": {}, "_readers": {}}

    def __len__(self) -> int:
        return self.manifest["records"]

    def column(self, name: str) -> np.ndarray:
        """A column, memory-mapped."""
        if name not in self._columns:
            num = {"ids": "letters", **dict.fromkeys(SPAN_COLUMNS, "pictures")}.get(name, "records")
            mapped = self.manifest[num] > 0  # there is no mapping of nothing
            self._columns[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r" if mapped else None)
        return self._columns[name]

    def spans(self, row: int) -> slice:
        """Where the pictures of a record stand in the columns of pictures."""
        starts = self.column("span_starts")
        return slice(int(starts[row]), int(starts[row + 1]))

    def id(self, row: int) -> str:
        """The record's own id, or what it is called without one."""
        starts = self.column("id_starts")
        name = self.column("ids")[int(starts[row]) : int(starts[row + 1])].tobytes().decode()
        if name:
            return name
        file = self._file(row)
        return default_id(Path(self.manifest["files"][file][0]), row - int(self._first[file]))

    def read(self, row: int) -> Conversation:
        """The record, from its data file.

        Raises:
            RuntimeError: the file has changed since it was indexed.
        """
        number = self._file(row)
        path, size, changed, _ = self.manifest["files"][number]
        if number not in self._readers:
            if stamp(Path(path)) != [size, changed]:
                raise RuntimeError(f"data file {path} has changed while it is in use; start again to index it anew")
            self._readers[number] = open_reader(Path(path))
        place = Place(int(self.column("at")[row]), int(self.column("size")[row]))
        try:
            ignore = self.manifest["made_with"]["ignore"]
            return normalize(self._readers[number].read(place), self.id(row), ignore)
        except (ValueError, OSError) as error:
            raise RuntimeError(f"data file {path} cannot be read where it was indexed: {error}") from error

    def errors(self) -> Iterator[dict[str, Any]]:
        """``row``, ``error`` and ``state`` of each record that cannot be used, in order."""
        with (self.folder / "errors.jsonl").open(encoding="utf-8") as file:
            yield from map(json.loads, file)

    def _file(self, row: int) -> int:
        return int(np.searchsorted(self._first, row, side="right")) - 1


def open_table(folder: Path, files: Sequence[Path], measure: Measure, workers: int) -> Table:
    """The table of ``files`` in ``folder``: opened, built, or built anew if a file has changed. The caller holds the
    lock.

    Raises:
        ValueError: a file cannot be read; names it.
    """
    stamps = [[str(file.resolve()), *stamp(file)] for file in files]
    reason = damage(folder) if folder.is_dir() else ""
    if folder.is_dir() and not reason:
        table = Table(folder)
        known = [entry[:3] for entry in table.manifest["files"]]
        if known == stamps:
            return _mended(table, measure)
        changed = next((new[0] for new, old in zip(stamps, known, strict=False) if new != old), None)
        log.warning(
            "%s since it was indexed; indexing again", f"{changed} has changed" if changed else "the files have changed"
        )
        shutil.rmtree(folder)
    elif folder.is_dir():
        log.warning("the index in %s is damaged (%s); indexing again", folder, reason)
        shutil.rmtree(folder)
    building = folder.with_name(f"{folder.name}.building")
    state = json.dumps({"version": VERSION, "files": stamps})
    if not (building / "files.json").is_file() or (building / "files.json").read_text() != state:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        (building / "files.json").write_text(state)
    pieces = _build_pieces(building, files, measure, workers)
    _assemble(building, pieces, stamps, measure).replace(folder)
    shutil.rmtree(building)
    return Table(folder)


def damage(folder: Path) -> str:
    """What is wrong with the files of a table as far as their sizes tell; empty if nothing is."""
    try:
        columns = json.loads((folder / "manifest.json").read_text())["columns"]
    except (OSError, ValueError, KeyError) as error:
        return f"manifest.json: {error}"
    for name, size in columns.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is {'cut off or changed' if path.is_file() else 'missing'}"
    return ""


class _Work(NamedTuple):
    """One piece of one file, and where its columns go."""

    file_number: int
    file: Path
    piece: Piece
    target: Path


def _build_pieces(building: Path, files: Sequence[Path], measure: Measure, workers: int) -> list[_Work]:
    """Measure what is not there yet; all pieces, in order."""
    every: list[_Work] = []
    kept = 0

    def missing() -> Iterator[_Work]:
        nonlocal kept
        for number, file in enumerate(files):
            for piece in open_reader(file).pieces():
                work = _Work(number, file, piece, building / f"{len(every):07d}.npz")
                every.append(work)
                if work.target.is_file():
                    kept += 1
                else:
                    yield work

    todo = missing()
    first = list(islice(todo, WORTH_PROCESSES))
    if kept:
        log.info("%s: going on with %d finished piece(s) of an earlier start", files[0].name, kept)
    if workers > 1 and len(first) == WORTH_PROCESSES:
        _measure_in_processes(chain(first, todo), measure, workers, files[0].name)
    else:
        worker = _Worker(measure)
        for work in chain(first, todo):
            worker(work)
    return every


class _Worker:
    """Measures pieces; keeps the last file open."""

    def __init__(self, measure: Measure):
        self.measure = measure
        self._reader: Reader | None = None

    def __call__(self, work: _Work) -> None:
        if self._reader is None or self._reader.path != work.file:
            self._reader = open_reader(work.file)
        measure_piece(self.measure, self._reader, work.piece, work.target)


_worker: _Worker  # of a process that builds


def _start_process(measure: Measure) -> None:
    """A process that builds: it ends with the one that started it, even if that was killed, and with nothing else."""
    global _worker
    for number in STOPPING:  # terminals and launchers send them to all: the rank decides
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for every core already
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _worker = _Worker(measure)


def _measure(work: _Work) -> None:
    _worker(work)


def _measure_in_processes(todo: Iterator[_Work], measure: Measure, workers: int, name: str) -> None:
    # Spawned, not forked: the training process has threads by now, and a fork would copy their locks as they stand.
    context = multiprocessing.get_context("spawn")
    begun = said = time.monotonic()
    done = 0
    with ProcessPoolExecutor(workers, context, _start_process, (measure,)) as pool:
        running = {_submitted(pool, work) for work in islice(todo, 2 * workers)}
        try:
            while running:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                done += len(finished)
                running |= {_submitted(pool, work) for work in islice(todo, len(finished))}
                if time.monotonic() - said > SECONDS_BETWEEN_LINES:
                    said = time.monotonic()
                    log.info("indexing %s: %d pieces in %.0f s", name, done, said - begun)
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"a process that indexed {name} was killed, perhaps for its memory; start again, with fewer "
                "data.workers: finished pieces are kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _submitted(pool: ProcessPoolExecutor, work: _Work) -> Future[None]:
    """Hand in a piece. A process that is started for it blocks signals until it is ready to ignore them."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        return pool.submit(_measure, work)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _assemble(building: Path, pieces: Sequence[_Work], stamps: Sequence[list[Any]], measure: Measure) -> Path:
    """Join the pieces' columns in a folder that becomes the table; in memory there is one piece at a time."""
    folder = building / "table"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    first, sizes = _sizes(pieces, len(stamps))
    records, pictures, letters = (int(sum(column)) for column in zip(*sizes, strict=True)) if sizes else (0, 0, 0)
    if not records:
        raise ValueError(f"data file {stamps[0][0]}{' and the others hold' if stamps[1:] else ' holds'} no record")
    lengths = {**dict.fromkeys(RECORD_COLUMNS, records), **dict.fromkeys(SPAN_COLUMNS, pictures), "ids": letters}
    dtypes = {**RECORD_COLUMNS, **dict.fromkeys(SPAN_COLUMNS, np.int32), "ids": np.uint8}
    columns = {name: _new_column(folder, name, dtypes[name], lengths[name]) for name in (*KEPT, *SPAN_COLUMNS, "ids")}
    span_starts, id_starts = (_new_column(folder, name, np.int64, records + 1) for name in ("span_starts", "id_starts"))
    hashes = _new_column(building, "id_hash", np.uint64, records)
    unread: Counter[str] = Counter()
    row = span = letter = bad = doubtful = 0
    with (folder / "errors.jsonl").open("w", encoding="utf-8") as errors:
        for work, (num, num_spans, num_letters) in zip(pieces, sizes, strict=True):
            with np.load(work.target) as piece:
                for name in KEPT:
                    columns[name][row : row + num] = piece[name]
                for name in SPAN_COLUMNS:
                    columns[name][span : span + num_spans] = piece[name]
                columns["ids"][letter : letter + num_letters] = piece["ids"]
                span_starts[row + 1 : row + num + 1] = span + np.cumsum(piece["num_spans"], dtype=np.int64)
                id_starts[row + 1 : row + num + 1] = letter + np.cumsum(piece["id_size"], dtype=np.int64)
                hashes[row : row + num] = piece["id_hash"]
                bad += int((piece["state"] != FINE).sum())
                doubtful += int((piece["state"] == NO_PICTURE).sum())
                unread.update(json.loads(piece["unread"].tobytes()))
                for line in piece["errors"].tobytes().decode().splitlines():
                    entry = json.loads(line)
                    errors.write(json.dumps({**entry, "row": entry["row"] + row}) + "\n")
            row, span, letter = row + num, span + num_spans, letter + num_letters
    manifest = {
        "version": VERSION,
        "made_with": measure.fingerprint(),
        "records": records,
        "pictures": pictures,
        "letters": letters,
        "bad": bad,
        "doubtful": doubtful,
        "unread": dict(sorted(unread.items())),
        "generation": 0,
        **_duplicates(hashes),
        "files": [[*entry, start] for entry, start in zip(stamps, first, strict=True)],
    }
    manifest["columns"] = {path.name: path.stat().st_size for path in sorted(folder.glob("*.npy"))}
    _write_manifest(folder, manifest)
    return folder


def _sizes(pieces: Sequence[_Work], num_files: int) -> tuple[list[int], list[tuple[int, int, int]]]:
    """The first record of each file; records, pictures and letters of ids of each piece."""
    sizes = []
    of_file = np.zeros(num_files, dtype=np.int64)
    for work in pieces:
        with np.load(work.target) as piece:
            sizes.append((len(piece["at"]), len(piece["height"]), len(piece["ids"])))
        of_file[work.file_number] += sizes[-1][0]
    return (np.cumsum(of_file) - of_file).tolist(), sizes


def _new_column(folder: Path, name: str, dtype: Any, length: int) -> np.ndarray:
    if not length:
        np.save(folder / f"{name}.npy", np.zeros(0, dtype=dtype))
        return np.zeros(0, dtype=dtype)
    return np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(length,))


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    temporary = folder / "manifest.tmp"
    temporary.write_text(json.dumps(manifest, indent=1))
    temporary.replace(folder / "manifest.json")


def _duplicates(hashes: np.ndarray) -> dict[str, Any]:
    """How many records have an id that another one before has too, and the rows of one such pair; a share of the
    hashes at a time."""
    count, rows = 0, None
    for bucket in range(BUCKETS):
        own = np.sort(hashes[(hashes % BUCKETS == bucket) & (hashes != 0)])
        again = np.flatnonzero(own[1:] == own[:-1])
        count += len(again)
        if rows is None and len(again):
            rows = np.flatnonzero(hashes == own[again[0]])[:2].tolist()
    return {"duplicates": count, "duplicate_rows": rows}


def _mended(table: Table, measure: Measure) -> Table:
    """Look again at pictures that could not be read (the files' stamps know nothing of them), and enter those that can
    be read by now."""
    if not table.manifest["doubtful"]:
        return table
    entries, found, doubtful = [], {}, 0
    for entry in table.errors():
        if entry["state"] == NO_PICTURE:
            result = measure([table.read(entry["row"])])[0]
            if result.state == FINE and len(result.spans) == _length(table.spans(entry["row"])):
                found[entry["row"]] = result
                continue
            doubtful += 1
        entries.append(entry)
    if not found:
        return table
    _enter(table.folder, found, table)
    temporary = table.folder / "errors.tmp"
    temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    temporary.replace(table.folder / "errors.jsonl")
    counts = {"bad": len(entries), "doubtful": doubtful, "generation": table.manifest["generation"] + 1}
    _write_manifest(table.folder, {**table.manifest, **counts})
    log.info("%d record(s) whose pictures could not be read can be used now", len(found))
    return Table(table.folder)


def _enter(folder: Path, found: dict[int, Measured], table: Table) -> None:
    """Write what was measured in place; room for the pictures was kept."""
    opened = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="r+")
        for name in ("text", "supervised", *(SPAN_COLUMNS if table.manifest["pictures"] else ()), "state")
    }
    for row, result in found.items():
        opened["text"][row], opened["supervised"][row] = result.text, result.supervised
        for name, values in zip(SPAN_COLUMNS, zip(*result.spans, strict=True), strict=True):
            opened[name][table.spans(row)] = values
        opened["state"][row] = result.state
    for column in opened.values():
        column.flush()  # type: ignore[attr-defined]


def _length(part: slice) -> int:
    return part.stop - part.start
