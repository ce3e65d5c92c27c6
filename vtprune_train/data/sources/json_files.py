"""Readers for JSONL (one record per line) and JSON (a list of records).

Records are parsed one at a time, so a file does not have to fit into memory.

Streaming parsers do not report the byte range of an element, which is needed to read it again; the standard library's
decoder, fed block by block, does. For an element that spans several blocks the end is located first, so that one that
is too large is skipped without being stored or parsed.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vtprune_train.data.sources.base import (
    BLOCK,
    MOST_VALUES,
    PIECE_BYTES,
    Malformed,
    Piece,
    Place,
    Reader,
    line_and_column,
    parse_record,
    too_many_bytes,
)

PARSED_BLOCKS = 4  # blocks of an incomplete element that are parsed before its end is located
_SPACE = re.compile(r"[ \t\r\n]*")


class Jsonl(Reader):
    """One record per line; empty lines are ignored. A line that is too long is skipped block by block."""

    def pieces(self) -> Iterator[Piece]:
        size, start = self.path.stat().st_size, 0
        with self.path.open("rb") as file:
            while start < size:
                file.seek(start + PIECE_BYTES - 1)  # a line that ends exactly here belongs to this piece
                _skip_line(file)
                stop = min(file.tell(), size)
                yield Piece(start, stop)
                start = stop

    def scan(self, piece: Piece) -> Iterator[tuple[Place, Any]]:
        with self.path.open("rb", buffering=BLOCK) as file:
            file.seek(piece.start)
            at = piece.start
            while at < piece.stop and (line := file.readline(self.max_bytes + 2)):  # 2: the line end
                size, is_blank = len(line), not line.strip()
                if size > self.max_bytes + 1 and line[-1:] != b"\n":
                    rest, rest_is_blank = _skip_line(file)
                    size, is_blank = size + rest, is_blank and rest_is_blank
                if not is_blank:
                    yield Place(at, size), self._parse(line, at) if size == len(line) else self._too_large(at, size)
                at += size

    def read(self, place: Place) -> Any:
        if place.size > self.max_bytes + 2:
            return self._too_large(*place)
        return self._parse(self._bytes(place), place.at)

    def _too_large(self, at: int, size: int) -> Malformed:
        return too_many_bytes(size, self.max_bytes, f"the line at byte {at}")

    def _parse(self, line: bytes, at: int) -> Any:
        if len(line) > self.max_bytes and len(line.rstrip(b"\r\n")) > self.max_bytes:
            return self._too_large(at, len(line))
        try:
            return parse_record(line.removeprefix(codecs.BOM_UTF8) if at == 0 else line, at)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            line_number = line_and_column(self.path, at).partition(",")[0]
            reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(f"{self.path}, {line_number}: not JSON ({reason})") from error


def _skip_line(file: BinaryIO) -> tuple[int, bool]:
    """Skip to the end of the line. Returns the number of bytes skipped and whether they are all white space."""
    size, is_blank = 0, True
    while block := file.readline(BLOCK):
        size += len(block)
        is_blank = is_blank and not block.strip()
        if block[-1:] == b"\n":
            break
    return size, is_blank


class JsonList(Reader):
    """The elements of a list; a place is the bytes of an element."""

    def pieces(self) -> Iterator[Piece]:
        start = stop = None
        for place, _ in self._elements(0, None):
            start = place.at if start is None else start
            stop = place.at + place.size
            if stop - start >= PIECE_BYTES:
                yield Piece(start, stop)
                start = None
        if start is not None and stop is not None:
            yield Piece(start, stop)

    def scan(self, piece: Piece) -> Iterator[tuple[Place, Any]]:
        return self._elements(piece.start, piece.stop)

    def read(self, place: Place) -> Any:
        if place.size > self.max_bytes:
            return too_many_bytes(place.size, self.max_bytes, f"at byte {place.at}")
        try:
            return parse_record(self._bytes(place), place.at)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            where = line_and_column(self.path, place.at)
            raise ValueError(f"{self.path}, byte {place.at}, {where}: not JSON ({error})") from error

    def _elements(self, start: int, stop: int | None) -> Iterator[tuple[Place, Any]]:
        """Elements of the list between bytes ``start`` and ``stop``; those of the whole file if ``stop`` is
        ``None``."""
        with closing(_Window(self.path, start, stop)) as text:
            yield from self._in(text, whole=stop is None)

    def _in(self, text: _Window, whole: bool) -> Iterator[tuple[Place, Any]]:
        if whole:
            first = text.peek()
            if first != "[":
                text.parse()  # raises if the file is not JSON
                kind = {"{": "dict", '"': "str"}.get(first, "value")
                hint = "; if each line is a record, rename it to .jsonl" if first == "{" else ""
                raise ValueError(f"data file {self.path} contains a {kind}, not a list of conversations{hint}")
            text.skip()
        separator = ""
        while (following := text.peek()) not in ("]", ""):
            if separator:
                if following != ",":
                    raise text.error("',' or ']' expected")
                text.skip()
                text.peek()
            at = text.at
            value = text.parse()
            place = Place(at, text.at - at)
            yield place, self.read(place) if value is _LARGE or place.size > MOST_VALUES else value
            separator = ","
        if whole:
            if following != "]":
                raise text.error("the list is not closed")
            text.skip()
            if text.peek():
                raise text.error("unexpected content after the list")


class _End:
    """Finds the end of a list, an object or a string in UTF-8, block by block. Quotes and nesting depth are computed
    for a whole block at once, so the speed does not depend on the content."""

    def __init__(self) -> None:
        self._quoted, self._backslashes, self._depth = False, 0, 0

    def within(self, block: bytes) -> int | None:
        """Bytes of ``block`` up to the end of the value; ``None`` if the value continues after the block."""
        if self._quoted and b'"' not in block:  # the usual case within a long string
            run = len(block) - len(block.rstrip(b"\\"))
            self._backslashes = (run + (self._backslashes if run == len(block) else 0)) % 2
            return None
        letters = np.frombuffer(block, np.uint8)
        quotes = (letters == ord('"')) & self._is_plain(block, letters)
        quoted = (np.cumsum(quotes, dtype=np.int32) + self._quoted) % 2 == 1
        opened = (letters == ord("[")) | (letters == ord("{"))
        closed = (letters == ord("]")) | (letters == ord("}"))
        steps = np.where(quoted, 0, opened.astype(np.int8) - closed.astype(np.int8))
        depth = self._depth + np.cumsum(steps, dtype=np.int64)
        ends = np.flatnonzero((depth <= 0) & ((steps < 0) | (quotes & ~quoted)))
        self._quoted, self._depth = bool(quoted[-1]), int(depth[-1])
        return int(ends[0]) + 1 if len(ends) else None

    def _is_plain(self, block: bytes, letters: np.ndarray) -> np.ndarray:
        """[letters] bool: whether a letter is preceded by an even number of backslashes, so that it is not escaped."""
        if not self._backslashes and b"\\" not in block:
            return np.ones(len(letters), dtype=bool)
        places = np.arange(len(letters), dtype=np.int32)
        others = np.maximum.accumulate(np.where(letters != ord("\\"), places, -1))  # last place without a backslash
        before = np.concatenate([[-1], others[:-1]])
        runs = places - 1 - before + np.where(before < 0, self._backslashes, 0)
        self._backslashes = (len(letters) - 1 - int(others[-1]) + (self._backslashes if others[-1] < 0 else 0)) % 2
        return runs % 2 == 0


class _EndOfNumber:
    """Like :class:`_End`, for a number, which ends before the first character that cannot be in one."""

    def within(self, block: bytes) -> int | None:
        size = len(block) - len(block.lstrip(b"+-.0123456789Ee"))
        return size if size < len(block) else None


_LARGE = object()  # instead of a value that was skipped because it is large or cannot be parsed


class _Window:
    """A moving view of a file's text; ``at`` is the current byte offset in the file."""

    def __init__(self, path: Path, start: int, stop: int | None):
        self.path, self.at = path, start
        self._file = path.open("rb")
        self._file.seek(start)
        self._left = path.stat().st_size - start if stop is None else stop - start
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._text, self._position = "", 0
        if start == 0 and self.peek() == "\ufeff":
            self.skip()

    def close(self) -> None:
        self._file.close()

    def error(self, message: str, beyond: int = 0) -> ValueError:
        """An error with ``message`` and the position ``beyond`` characters after the current one."""
        at = self.at + len(self._text[self._position : self._position + beyond].encode())
        return ValueError(f"{self.path}: not JSON ({message}, at byte {at}: {line_and_column(self.path, at)})")

    def peek(self) -> str:
        """Skip white space and return the next character; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._position)
            self._move(match.end() if match else self._position)
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._more(BLOCK):
                return ""

    def skip(self) -> None:
        self._move(self._position + 1)

    def parse(self) -> Any:
        """Parse the value at the current position; ``_LARGE`` if it was skipped."""
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                if len(self._text) - self._position >= PARSED_BLOCKS * BLOCK:
                    return self._skip_value(error.msg, error.pos - self._position)
                if not self._more(BLOCK):
                    raise self.error(error.msg, error.pos - self._position) from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nested too deeply
                return self._skip_value(str(error))
            else:
                if end < len(self._text) or not self._more(BLOCK):  # a number may continue in the next block
                    self._move(end)
                    return value

    def _skip_value(self, message: str, beyond: int = 0) -> Any:
        """Skip the value at the current position without storing it. ``message`` says why it cannot be parsed, for
        the error that is raised if it cannot be skipped either."""
        first = self._text[self._position]
        if first not in '[{"-0123456789':
            raise self.error(message, beyond)
        at, stop = self.at, self._file.tell() + self._left
        end = _End() if first in '[{"' else _EndOfNumber()
        self._file.seek(at)
        size = None
        while size is None and (block := self._file.read(min(BLOCK, stop - at))):
            size = end.within(block)
            at += len(block) if size is None else size
        if size is None and first in '[{"':  # a number may end with the piece
            raise self.error(message, beyond)
        self._file.seek(at)
        self._decode.reset()
        self.at, self._left, self._text, self._position = at, stop - at, "", 0
        return _LARGE

    def _move(self, position: int) -> None:
        self.at += len(self._text[self._position : position].encode())
        self._position = position

    def _more(self, size: int) -> bool:
        """Read another block; false at the end."""
        block = self._file.read(min(size, self._left))
        if not block:
            return False
        self._left -= len(block)
        try:
            decoded = self._decode.decode(block, final=not self._left)
        except UnicodeDecodeError as error:
            raise self.error(f"not UTF-8: {error.reason}") from error
        self._text, self._position = self._text[self._position :] + decoded, 0
        return True
