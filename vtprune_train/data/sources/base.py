"""What the index asks of a data file: pieces to read in parallel, and any record again by its place."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

PIECE_BYTES = 8 << 20
PIECE_ROWS = 8192


class Malformed(str):
    """In place of a record that cannot be parsed: what is wrong with it."""

    __slots__ = ()


class Piece(NamedTuple):
    """A part of a file that one process measures: bytes, rows or row groups ``[start, stop)``, as the reader counts."""

    start: int
    stop: int


class Place(NamedTuple):
    """Where a record is. In text files and tars: first byte and number of bytes; in tables: see the reader."""

    at: int
    size: int


class Reader(ABC):
    """One data file. A reader may be used in processes forked from the one that made it."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def unread(self) -> list[str]:
        """Columns that no record is given."""
        return []

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """Parts in the file's order. They depend on the file alone, so that finished ones can be kept.

        Raises:
            ValueError: the file is not of its kind; names it.
        """

    @abstractmethod
    def scan(self, piece: Piece) -> Iterator[tuple[Place, Any]]:
        """The records of a piece, one at a time, and their places.

        Raises:
            ValueError: the file is broken; names the place.
        """

    @abstractmethod
    def read(self, place: Place) -> Any:
        """The record at a place that :meth:`scan` gave."""


class BytesAt:
    """Random access to the bytes of a file, from any process: forked ones share an open file's position, so each opens
    its own."""

    def __init__(self, path: Path):
        self.path = path
        self._opened: tuple[int, BinaryIO] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_opened": None}

    def read(self, at: int, size: int) -> bytes:
        """``size`` bytes from byte ``at`` on; fewer at the file's end."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), self.path.open("rb"))
        parts = []
        while size > 0 and (part := os.pread(self._opened[1].fileno(), min(size, 1 << 30), at)):
            parts.append(part)
            at, size = at + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def line_and_column(path: Path, at: int) -> str:
    """Where byte ``at`` of a text file is, both counted from 1 (the column in bytes); read only to name it."""
    line, begin, position = 1, 0, 0
    with path.open("rb") as file:
        while position < at and (block := file.read(min(PIECE_BYTES, at - position))):
            line += block.count(b"\n")
            begin = position + block.rfind(b"\n") + 1 if b"\n" in block else begin
            position += len(block)
    return f"line {line}, column {at - begin + 1}"
