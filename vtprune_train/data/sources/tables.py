"""Tables of records: parquet files, and datasets on disk as ``save_to_disk`` writes them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_from_disk

from vtprune_train.data.fields import CONVERSATIONS, is_harmless, is_looked_at
from vtprune_train.data.sources.base import PIECE_ROWS, Piece, Place, Reader

BATCH = 64  # rows turned to Python objects at a time: pictures are among them


def _columns(path: Path, names: Sequence[str]) -> list[str]:
    """The columns that are read: those that a record needs, and those that may make it malformed.

    Raises:
        ValueError: there is no conversation among them.
    """
    if not set(CONVERSATIONS) & set(names):
        raise ValueError(
            f"data file {path} has no column 'conversations' or 'messages'; its columns: {', '.join(names)}"
        )
    return [name for name in names if is_looked_at(name)]


def _unread(names: Sequence[str]) -> list[str]:
    return [name for name in names if not is_looked_at(name) and not is_harmless(name)]


class Parquet(Reader):
    """A place is ``(row group, row in it)``: reading a record reads the columns of its row group."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._opened: tuple[int, pq.ParquetFile, list[str]] | None = None
        self._group: tuple[int, pa.Table] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_opened": None, "_group": None}

    @property
    def unread(self) -> list[str]:
        return _unread(self._open()[0].schema_arrow.names)

    def _open(self) -> tuple[pq.ParquetFile, list[str]]:
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                file = pq.ParquetFile(self.path)
            except pa.ArrowInvalid as error:
                raise ValueError(f"data file {self.path} is not parquet, or is cut off ({error})") from error
            self._opened = (os.getpid(), file, _columns(self.path, file.schema_arrow.names))
            self._group = None
        return self._opened[1:]

    def pieces(self) -> Iterator[Piece]:
        metadata = self._open()[0].metadata
        start = rows = 0
        for group in range(metadata.num_row_groups):
            rows += metadata.row_group(group).num_rows
            if rows >= PIECE_ROWS or group + 1 == metadata.num_row_groups:
                yield Piece(start, group + 1)
                start, rows = group + 1, 0

    def scan(self, piece: Piece) -> Iterator[tuple[Place, Any]]:
        file, columns = self._open()
        for group in range(piece.start, piece.stop):
            batches = file.iter_batches(BATCH, row_groups=[group], columns=columns, use_threads=False)
            rows = (row for batch in batches for row in batch.to_pylist())
            try:
                for number, row in enumerate(rows):
                    yield Place(group, number), row
            except (OSError, pa.ArrowException) as error:
                raise ValueError(f"data file {self.path} is broken in row group {group} ({error})") from error

    def read(self, place: Place) -> Any:
        file, columns = self._open()
        if self._group is None or self._group[0] != place.at:
            self._group = (place.at, file.read_row_group(place.at, columns=columns, use_threads=False))
        return self._group[1].slice(place.size, 1).to_pylist()[0]


class DatasetOnDisk(Reader):
    """A place is ``(row, 0)``. Pictures of an ``Image`` feature come as they are stored, not decoded."""

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            table = load_from_disk(str(path))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(f"data folder {path} cannot be read as a dataset ({error})") from error
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
            rows = self._table[start : min(start + BATCH, piece.stop)].to_pylist()
            for number, row in enumerate(rows):
                yield Place(start + number, 0), row

    def read(self, place: Place) -> Any:
        return self._table[place.at : place.at + 1].to_pylist()[0]
