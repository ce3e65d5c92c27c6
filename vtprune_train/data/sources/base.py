"""What the index asks of a data file: pieces to read in parallel, and any record again by its place."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

PIECE_BYTES = 8 << 20
PIECE_ROWS = 8192
BLOCK = 1 << 20  # bytes read at a time of what is passed over
MOST_VALUES = 1 << 20  # of one record: as Python objects, millions of tiny values take many times their bytes


class Malformed(str):
    """In place of a record that cannot be parsed: what is wrong with it."""

    __slots__ = ()


class TooLarge(Malformed):
    """In place of a record that is not read because of its size: how large it is, and the bound."""

    __slots__ = ()


class Bounds(NamedTuple):
    """Bytes of one record beyond which it is left alone (``data.max_record_bytes``, ``data.max_text_bytes``): as it
    stands in its file, with its images where they are inside; and of its text."""

    record: int = 32 << 20
    text: int = 1 << 20


BOUNDS = Bounds()


def too_many_bytes(size: int, bound: int, at: str = "") -> TooLarge:
    """Of a record that has ``size`` bytes; ``at`` says where it is."""
    return TooLarge(f"it has {size} bytes{at and f' ({at})'}, more than data.max_record_bytes={bound}")


def parse_record(content: bytes, at: int) -> Any:
    """The record written in JSON from byte ``at`` on; :class:`Malformed` where it holds too many values (commas and
    brackets within its texts are counted too), is nested too deeply, or has a number of thousands of digits.

    Raises:
        json.JSONDecodeError, UnicodeDecodeError: it is not JSON.
    """
    count = sum(map(content.count, (b",", b"[", b"{"))) if len(content) > MOST_VALUES else 0
    if count > MOST_VALUES:
        return TooLarge(f"it holds {count} values in {len(content)} bytes (from byte {at} on), more than {MOST_VALUES}")
    try:
        return json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except RecursionError:
        return Malformed("its values are nested too deeply to be read")
    except ValueError as error:
        return Malformed(f"it cannot be read ({error})")


class Piece(NamedTuple):
    """A part of a file that one process measures: bytes, rows or row groups ``[start, stop)``, as the reader counts."""

    start: int
    stop: int


class Place(NamedTuple):
    """Where a record is. In text files and tars: first byte and number of bytes; in tables: see the reader."""

    at: int
    size: int


class Reader(ABC):
    """Reads one data file. Subclasses implement :meth:`pieces`, :meth:`scan` and :meth:`read`.

    An entry of the data names a subclass outside the package by its path: ``{path: pairs.csv, reader:
    my_readers.py:Pairs}``. Each process opens its own reader. ``scan`` runs in the processes that build the index,
    ``read`` in the data loader's workers, in any order. A record is plain data as in JSON: a mapping with
    ``conversations`` or ``messages``, ``image`` or ``images`` (a name in the entry's folder of images, or the encoded
    image as ``bytes``), and optionally ``id``.

    Args:
        path: the data file.
        max_bytes: size limit of a record; ``scan`` should yield ``too_many_bytes(size, max_bytes)`` instead of reading
            a larger one.
    """

    def __init__(self, path: Path, max_bytes: int = BOUNDS.record):
        self.path, self.max_bytes = path, max_bytes
        self._file: IO[bytes] | None = None

    def _bytes(self, place: Place) -> bytes:
        """The bytes at a place of a text file, fewer at its end. It stays open; a process that was forked from this one
        shares its position, which ``pread`` does not use."""
        self._file = self._file or self.path.open("rb")
        return os.pread(self._file.fileno(), place.size, place.at)

    @property
    def unread(self) -> list[str]:
        """Names of columns in the file that are not part of its records; a warning lists them."""
        return []

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """Parts of the file, in order, that can be scanned in parallel. They must depend on the file alone: an
        interrupted build continues from its finished pieces.

        Raises:
            ValueError: the file is not of this reader's kind; names it.
        """

    @abstractmethod
    def scan(self, piece: Piece) -> Iterator[tuple[Place, Any]]:
        """Yield the place and the content of each record of a piece. Yields :class:`Malformed` instead of a record that
        cannot be parsed, and :class:`TooLarge` instead of one that exceeds ``max_bytes``.

        Raises:
            ValueError: the file is broken; names the position.
        """

    @abstractmethod
    def read(self, place: Place) -> Any:
        """The record that :meth:`scan` yielded with this place."""


def utf8_length(text: str) -> int:
    """Bytes of a text in UTF-8; half a character counts three."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def line_and_column(path: Path, at: int) -> str:
    """Where byte ``at`` of a text file is, both counted from 1 (the column in bytes); read only to name it."""
    line, begin, position = 1, 0, 0
    with path.open("rb") as file:
        while position < at and (block := file.read(min(PIECE_BYTES, at - position))):
            line += block.count(b"\n")
            begin = position + block.rfind(b"\n") + 1 if b"\n" in block else begin
            position += len(block)
    return f"line {line}, column {at - begin + 1}"
