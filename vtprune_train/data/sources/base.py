"""The interface of data readers: a file is divided into pieces that are scanned in parallel, and any record can be read
again by its place."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

PIECE_BYTES = 8 << 20
PIECE_ROWS = 8192
BLOCK = 1 << 20  # bytes read at a time where content is skipped
MOST_VALUES = 1 << 20  # in a record: small values take many times their size as Python objects


class Malformed(str):
    """Returned instead of a record that cannot be parsed; the text is the reason."""

    __slots__ = ()


class TooLarge(Malformed):
    """Returned instead of a record that is too large to read; the text gives its size and the limit."""

    __slots__ = ()


class Bounds(NamedTuple):
    """Size limits of a record in bytes: ``record`` (``data.max_record_bytes``) as stored in its file, with embedded
    images; ``text`` (``data.max_text_bytes``) of its text alone."""

    record: int = 32 << 20
    text: int = 1 << 20


BOUNDS = Bounds()


def too_many_bytes(size: int, bound: int, at: str = "") -> TooLarge:
    """The result for a record of ``size`` bytes; ``at`` describes its position."""
    return TooLarge(f"it has {size} bytes{at and f' ({at})'}, more than data.max_record_bytes={bound}")


def parse_record(content: bytes, at: int) -> Any:
    """Parse a record in JSON that starts at byte ``at`` of its file. Returns :class:`Malformed` if it has too many
    values (estimated from commas and brackets, including those inside strings), is nested too deeply, or contains a
    number with thousands of digits.

    Raises:
        json.JSONDecodeError, UnicodeDecodeError: the content is not JSON.
    """
    count = sum(map(content.count, (b",", b"[", b"{"))) if len(content) > MOST_VALUES else 0
    if count > MOST_VALUES:
        return TooLarge(f"it has {count} values in {len(content)} bytes (from byte {at}), more than {MOST_VALUES}")
    try:
        return json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except RecursionError:
        return Malformed("its values are nested too deeply to be read")
    except ValueError as error:
        return Malformed(f"it cannot be read ({error})")


class Piece(NamedTuple):
    """A part of a file that one process scans: ``[start, stop)`` in the reader's own unit (bytes, rows, row groups)."""

    start: int
    stop: int


class Place(NamedTuple):
    """The position of a record. In text files and tars, its first byte and its number of bytes; in tables, see the
    reader."""

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
        """The bytes at a place, fewer at the end of the file. The file stays open; ``pread`` does not use the file
        position, which forked processes share."""
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
            ValueError: the file is not of this reader's kind; the message names it.
        """

    @abstractmethod
    def scan(self, piece: Piece) -> Iterator[tuple[Place, Any]]:
        """Yield the place and the content of each record of a piece. Yields :class:`Malformed` instead of a record that
        cannot be parsed, and :class:`TooLarge` instead of one that exceeds ``max_bytes``.

        Raises:
            ValueError: the file is broken; the message names the position.
        """

    @abstractmethod
    def read(self, place: Place) -> Any:
        """The record that :meth:`scan` yielded with this place."""


def utf8_length(text: str) -> int:
    """Length of a text in UTF-8, in bytes; an unpaired surrogate counts as three."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def line_and_column(path: Path, at: int) -> str:
    """Line and column of byte ``at`` of a text file for error messages, counted from 1; the column is in bytes."""
    line, begin, position = 1, 0, 0
    with path.open("rb") as file:
        while position < at and (block := file.read(min(PIECE_BYTES, at - position))):
            line += block.count(b"\n")
            begin = position + block.rfind(b"\n") + 1 if b"\n" in block else begin
            position += len(block)
    return f"line {line}, column {at - begin + 1}"
