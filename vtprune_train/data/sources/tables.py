"""Readers for tables: parquet files, and datasets that ``save_to_disk`` of the datasets library wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_from_disk

from vtprune_train.data.fields import CONVERSATIONS, is_harmless, is_looked_at
from vtprune_train.data.sources.arrow_rows import (
    BATCH,
    BATCH_BYTES,
    Rows,
    batches_apart,
    batches_of,
    chunks,
    has_large_page,
    within,
)
from vtprune_train.data.sources.base import BOUNDS, PIECE_ROWS, Piece, Place, Reader, too_many_bytes

LARGEST_HELD = 128 << 20  # bytes of a row group's rows that are kept in memory


def _columns(path: Path, names: Sequence[str]) -> list[str]:
    """The columns to read: those that a record consists of, and those that may make it malformed."""
    if not set(CONVERSATIONS) & set(names):
        raise ValueError(f"data file {path} has no column 'conversations' or 'messages'; it has {', '.join(names)}")
    return [name for name in names if is_looked_at(name)]


def _unread(names: Sequence[str]) -> list[str]:
    return [name for name in names if not is_looked_at(name) and not is_harmless(name)]


def _objects(rows: Rows, bound: int) -> Iterator[dict[str, Any] | int]:
    """Each row, or its size in bytes if that exceeds ``bound``."""
    batch, sizes = rows
    if sizes[sizes <= bound].sum() <= BATCH_BYTES:
        objects = iter(batch.to_pylist())
    else:
        objects = (batch.slice(number, 1).to_pylist()[0] for number in range(len(batch)))
    for row, size in zip(objects, sizes.tolist(), strict=True):
        yield row if size <= bound else size


class _Held(NamedTuple):
    """Consecutive rows of a row group; ``sizes`` [rows] are their sizes in bytes, ``None`` if not computed."""

    group: int
    first: int
    table: pa.Table
    sizes: np.ndarray | None


class Parquet(Reader):
    """A place is ``(row group, row)``. Reading a record loads its row group, or a part of a large one, and keeps it in
    memory."""

    def __init__(self, path: Path, max_bytes: int = BOUNDS.record):
        super().__init__(path, max_bytes)
        self._opened: tuple[pq.ParquetFile, list[str]] | None = None
        self._held: _Held | None = None
        self._apart: dict[int, bool] = {}  # by row group: whether it is read in a separate process

    @property
    def unread(self) -> list[str]:
        return _unread(self._open()[0].schema_arrow.names)

    def _open(self) -> tuple[pq.ParquetFile, list[str]]:
        if self._opened is None:
            try:
                file = pq.ParquetFile(self.path)
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno:  # an error of the system; Arrow's have no errno
                    raise
                raise ValueError(
                    f"data file {self.path} is not parquet, or is truncated or damaged ({error})"
                ) from error
            self._opened = (file, _columns(self.path, file.schema_arrow.names))
        return self._opened

    def pieces(self) -> Iterator[Piece]:
        metadata = self._open()[0].metadata
        start = rows = 0
        for group in range(metadata.num_row_groups):
            rows += metadata.row_group(group).num_rows
            if rows >= PIECE_ROWS or group + 1 == metadata.num_row_groups:
                yield Piece(start, group + 1)
                start, rows = group + 1, 0

    def scan(self, piece: Piece) -> Iterator[tuple[Place, Any]]:
        for group in range(piece.start, piece.stop):
            number = 0
            try:
                for rows in self._batches(group):
                    for row in _objects(rows, self.max_bytes):
                        yield Place(group, number), self._record(row, group, number)
                        number += 1
            except (OSError, pa.ArrowException) as error:
                raise ValueError(f"data file {self.path} is broken in row group {group} ({error})") from error

    def read(self, place: Place) -> Any:
        group, row = place
        held = self._held
        if held is None or held.group != group or not held.first <= row < held.first + len(held.table):
            self._held = held = None  # free memory before reading more
            self._held = held = self._hold(group, row)
        at = row - held.first
        [batch] = held.table.slice(at, 1).combine_chunks().to_batches()
        rows = within(batch, self.max_bytes) if held.sizes is None else (batch, held.sizes[at : at + 1])
        [record] = _objects(rows, self.max_bytes)
        return self._record(record, group, row)

    def _record(self, row: dict[str, Any] | int, group: int, number: int) -> Any:
        if isinstance(row, int):
            return too_many_bytes(row, self.max_bytes, f"row {number} of row group {group}")
        return row

    def _batches(self, group: int) -> Iterator[Rows]:
        file, columns = self._open()
        if group not in self._apart:
            self._apart[group] = has_large_page(self.path, file, group, columns)
        if not self._apart[group]:
            yield from batches_of(file, group, columns, self.max_bytes)
            return
        has_large = False
        for batch, sizes in batches_apart(self.path, group, columns, self.max_bytes):
            has_large = has_large or bool((sizes > self.max_bytes).any())
            yield batch, sizes
        self._apart[group] = has_large  # a large page of small rows can be read in this process next time

    def _hold(self, group: int, row: int) -> _Held:
        """The row group, or the part that contains ``row`` if the group exceeds ``LARGEST_HELD``."""
        file, columns = self._open()
        if group not in self._apart:
            self._apart[group] = has_large_page(self.path, file, group, columns)
        size = sum(leaf.total_uncompressed_size for leaf in chunks(file, group, columns))
        if not self._apart[group] and size <= LARGEST_HELD:
            return _Held(group, 0, file.read_row_group(group, columns=columns, use_threads=False), None)
        first = num_bytes = 0
        held: list[Rows] = []
        for batch, sizes in self._batches(group):
            if num_bytes > LARGEST_HELD:
                end = first + sum(len(rows) for rows, _ in held)
                if row < end:
                    break
                first, num_bytes, held = end, 0, []
            held.append((batch, sizes))
            num_bytes += int(sizes[sizes <= self.max_bytes].sum())
        batches, counted = zip(*held, strict=True)
        return _Held(group, first, pa.Table.from_batches(batches), np.concatenate(counted))


class DatasetOnDisk(Reader):
    """A place is ``(row, 0)``. Images of an ``Image`` feature are returned as stored, not decoded."""

    def __init__(self, path: Path, max_bytes: int = BOUNDS.record):
        super().__init__(path, max_bytes)
        try:
            table = load_from_disk(str(path))
        # Damaged metadata files raise KeyError or TypeError.
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise ValueError(f"data folder {path} cannot be read as a dataset ({error!r})") from error
        self._unread = _unread(table.column_names)
        self._table = table.select_columns(_columns(path, table.column_names)).with_format("arrow")

    @property
    def unread(self) -> list[str]:
        return self._unread

    def pieces(self) -> Iterator[Piece]:
        for start in range(0, len(self._table), PIECE_ROWS):
            yield Piece(start, min(start + PIECE_ROWS, len(self._table)))

    def scan(self, piece: Piece) -> Iterator[tuple[Place, Any]]:
        for start in range(piece.start, piece.stop, BATCH):
            yield from self._rows(start, min(start + BATCH, piece.stop))

    def read(self, place: Place) -> Any:
        return next(self._rows(place.at, place.at + 1))[1]

    def _rows(self, start: int, stop: int) -> Iterator[tuple[Place, Any]]:
        number = start
        for batch in self._table[start:stop].to_batches():
            try:
                rows = within(batch, self.max_bytes)
            except pa.ArrowException as error:
                raise ValueError(
                    f"data folder {self.path} is broken in rows {number} to {number + len(batch) - 1} ({error})"
                ) from error
            for row in _objects(rows, self.max_bytes):
                if isinstance(row, int):
                    yield Place(number, 0), too_many_bytes(row, self.max_bytes, f"row {number}")
                else:
                    yield Place(number, 0), row
                number += 1
