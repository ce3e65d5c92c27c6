"""The table of one source: its measured records as memory-mapped columns on disk.

A table is a sealed folder (see :mod:`vtprune_train.files.checksums`) of ``.npy`` columns;
:mod:`vtprune_train.data.building` builds it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vtprune_train.data.building import build_table, remove_builds
from vtprune_train.data.measure import BATCH, FINE, NO_IMAGE, SPAN_COLUMNS, Measure, Measured, content_hash
from vtprune_train.data.records import Conversation, default_id, normalize
from vtprune_train.data.sources import open_reader, stamp
from vtprune_train.data.sources.base import Place, Reader
from vtprune_train.files.checksums import Watch, checksum, damage, read_manifest, seal
from vtprune_train.files.disk import remove, replace_synced, sync

log = logging.getLogger(__name__)

DISTRUSTED = "distrusted.txt"  # in a table's folder: the reason to rebuild it


class Table:
    """The columns of a finished table; opening it reads only the manifest.

    ``manifest`` contains the numbers of ``records``, ``pictures``, ``bad`` records, ``doubtful`` records (with images
    that cannot be read) and ``duplicates``; ``unread`` (number of records with each field that is not read); ``files``
    (path, stamp and first record of each); ``generation``; ``made_with`` (settings); and ``sums`` of its files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._watch = Watch(folder, self.manifest["sums"])
        self._columns: dict[str, np.ndarray] = {}
        self._readers: dict[int, Reader] = {}
        self._first = np.array([first for *_, first in self.manifest["files"]], dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_columns": {}, "_readers": {}}

    def __len__(self) -> int:
        return self.manifest["records"]

    def column(self, name: str) -> np.ndarray:
        """A column, memory-mapped."""
        if name not in self._columns:
            num = {"ids": "letters", **dict.fromkeys(SPAN_COLUMNS, "pictures")}.get(name, "records")
            mapped = self.manifest[num] > 0  # an empty file cannot be mapped
            self._columns[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r" if mapped else None)
        return self._columns[name]

    def spans(self, row: int) -> slice:
        """The rows of a record's images in the columns of images."""
        starts = self.column("span_starts")
        return slice(int(starts[row]), int(starts[row + 1]))

    def id(self, row: int) -> str:
        """The record's id, or the default id of a record without one."""
        starts = self.column("id_starts")
        name = self.column("ids")[int(starts[row]) : int(starts[row + 1])].tobytes().decode(errors="replace")
        if name:
            return name
        file = self._file(row)
        return default_id(Path(self.manifest["files"][file][0]), row - int(self._first[file]))

    def read(self, row: int) -> Conversation:
        """Read a record from its data file; raises ``RuntimeError`` if it has changed since it was indexed."""
        number, made_with = self._file(row), self.manifest["made_with"]
        path, size, changed, *_ = self.manifest["files"][number]
        if number not in self._readers and stamp(Path(path))[:2] != [size, changed]:
            raise RuntimeError(f"data file {path} changed while it was in use; start again to rebuild its index")
        place = Place(int(self.column("at")[row]), int(self.column("size")[row]))
        try:
            if number not in self._readers:
                self._readers[number] = _open(Path(path), made_with)
            record = _normalized(self._readers[number].read(place), made_with)
        except OSError as error:
            raise RuntimeError(f"data file {path} cannot be read: {error}") from error
        except ValueError as error:
            raise self.distrusted(f"data file {path} cannot be read at the indexed position: {error}") from error
        if content_hash(record) != self.column("content")[row]:
            raise self.distrusted(f"data file {path}: record {self.id(row)} differs from what was indexed")
        return record if record.id else replace(record, id=self.id(row))

    def check(self) -> None:
        """Raise ``RuntimeError`` if a column was changed since it was opened."""
        if name := self._watch.changed():
            raise self.distrusted(f"{self.folder / name} was changed while it was in use")

    def distrusted(self, reason: str) -> RuntimeError:
        """Mark a table that does not fit its data, so that the next start rebuilds it. Returns the error to raise."""
        try:
            (self.folder / DISTRUSTED).write_text(reason)
        except OSError as error:
            return RuntimeError(f"{reason}; remove {self.folder} and start again to rebuild the index ({error})")
        return RuntimeError(f"{reason}; start again to rebuild the index")

    def errors(self) -> Iterator[dict[str, Any]]:
        """``row``, ``error`` and ``state`` of each record that cannot be used, in order."""
        with (self.folder / "errors.jsonl").open(encoding="utf-8") as file:
            yield from map(json.loads, file)

    def _file(self, row: int) -> int:
        return int(np.searchsorted(self._first, row, side="right")) - 1


def _open(file: Path, made_with: Mapping[str, Any]) -> Reader:
    """A reader with the settings that the table was built with."""
    return open_reader(file, made_with["bounds"][0], made_with.get("reader", [""])[0])


def open_table(folder: Path, files: Sequence[Path], measure: Measure, workers: int) -> Table:
    """Open the table of ``files`` in ``folder``; build it if it is missing, damaged, or a file has changed. The caller
    holds the lock.

    Raises:
        ValueError: a file cannot be read; the message names it.
    """
    stamps = [[str(file.resolve()), *stamp(file)] for file in files]
    if folder.exists():
        reason = _outdated(folder, files, stamps, measure)
        if not reason:
            remove_builds(folder)
            return _measure_doubtful(Table(folder), measure)
        log.warning("%s; indexing again", reason)
    remove(folder)
    build_table(folder, files, stamps, measure, workers)
    return Table(folder)


def _outdated(folder: Path, files: Sequence[Path], stamps: Sequence[list[Any]], measure: Measure) -> str:
    """Why a table must be rebuilt; empty if it is up to date."""
    if what := damage(folder):
        return f"the index in {folder} is damaged ({what})"
    distrusted = folder / DISTRUSTED
    if os.path.lexists(distrusted):
        reason = distrusted.read_text(errors="replace") if distrusted.is_file() else f"{distrusted} is not a file"
        return reason or f"the index in {folder} does not fit its data"  # empty if the disk was full
    table = Table(folder)
    if table.manifest["made_with"] != measure.fingerprint():
        return f"the index in {folder} was built with other settings"
    known = [entry[:-1] for entry in table.manifest["files"]]
    if [entry[:3] for entry in known] != [entry[:3] for entry in stamps]:
        changed = next((new[0] for new, old in zip(stamps, known, strict=False) if new[:3] != old[:3]), None)
        return f"{changed or 'the list of data files'} has changed since it was indexed"
    touched = [number for number, entry in enumerate(stamps) if entry != known[number]]
    for number in touched:
        log.info("%s was written, moved or copied since it was indexed; comparing its records", files[number])
        if not _is_unchanged(table, number, files[number]):
            return f"{files[number]} has changed since it was indexed, although its size and time are the same"
    if touched:
        entries = [[*new, old[-1]] for new, old in zip(stamps, table.manifest["files"], strict=True)]
        seal(folder, {**table.manifest, "files": entries}, table.manifest["sums"])
    return ""


def _normalized(record: Any, made_with: Mapping[str, Any]) -> Conversation:
    """The conversation of a record as it was indexed."""
    return normalize(record, "", made_with["ignore"], made_with["bounds"][1], chat=made_with.get("chat", False))


def _is_unchanged(table: Table, number: int, file: Path) -> bool:
    """Whether a file has the indexed records at the same places. Images are not compared."""
    bounds = [*(entry[-1] for entry in table.manifest["files"]), len(table)]
    row = bounds[number]
    made_with = table.manifest["made_with"]
    reader = _open(file, made_with)
    records = (entry for piece in reader.pieces() for entry in reader.scan(piece))
    while batch := list(islice(records, BATCH)):
        rows = slice(row, row + len(batch))
        entries = [(*place, content_hash(_normalized(record, made_with))) for place, record in batch]
        for name, values in zip(("at", "size", "content"), zip(*entries, strict=True), strict=True):
            if table.column(name)[rows].tolist() != list(values):
                return False
        row += len(batch)
    return row == bounds[number + 1]


def _measure_doubtful(table: Table, measure: Measure) -> Table:
    """Measure records again whose images could not be read (the data files' stamps do not include images), and enter
    those that can be read now."""
    if not table.manifest["doubtful"]:
        return table
    entries, readable, doubtful = [], {}, 0
    for entry in table.errors():
        if entry["state"] == NO_IMAGE:
            result = measure([table.read(entry["row"])])[0]
            if result.state == FINE and len(result.spans) == len(table.column("height")[table.spans(entry["row"])]):
                readable[entry["row"]] = result
                continue
            doubtful += 1
        entries.append(entry)
    if not readable:
        return table
    names = _enter(table.folder, readable, table)
    replace_synced(table.folder / "errors.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries).encode())
    counts = {"bad": len(entries), "doubtful": doubtful, "generation": table.manifest["generation"] + 1}
    changed = {name: checksum(table.folder / name) for name in ("errors.jsonl", *names)}
    seal(table.folder, {**table.manifest, **counts}, {**table.manifest["sums"], **changed})
    log.info("%d record(s) whose images could not be read can be used now", len(readable))
    return Table(table.folder)


def _enter(folder: Path, measured: dict[int, Measured], table: Table) -> list[str]:
    """Write measurements by row to copies of the columns (which have space reserved for the images) and replace the
    columns by the copies: runs that have mapped the old files continue with them. Returns the names of the files."""
    names = ("text", "supervised", *(SPAN_COLUMNS if table.manifest["pictures"] else ()), "state")
    copies = {name: Path(shutil.copyfile(folder / f"{name}.npy", folder / f"{name}.tmp")) for name in names}
    opened = {name: np.lib.format.open_memmap(copy, mode="r+") for name, copy in copies.items()}
    for row, result in measured.items():
        opened["text"][row], opened["supervised"][row] = result.text, result.supervised
        for name, values in zip(SPAN_COLUMNS, zip(*result.spans, strict=True), strict=True):
            opened[name][table.spans(row)] = values
        opened["state"][row] = result.state
    for name, column in opened.items():
        column.flush()  # type: ignore[attr-defined]
        sync(copies[name])
        copies[name].replace(folder / f"{name}.npy")
    return [f"{name}.npy" for name in names]
