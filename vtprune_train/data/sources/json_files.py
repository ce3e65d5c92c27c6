"""JSONL (one record a line, cut into pieces at line ends) and JSON (a list of records).

Records are parsed one at a time, so a file never has to fit into memory.

Streaming parsers do not tell at which byte an element begins and ends, by which it is read again; the standard
library's decoder, fed block by block, does. The end of an element that is larger than some blocks is located first, so
that one of too many bytes is passed over without being kept or parsed.
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

PARSED_BLOCKS = 4  # of an element whose end is not known
_SPACE = re.compile(r"[ \t\r\n]*")


class Jsonl(Reader):
    """Empty lines are not records. A line of too many bytes is passed over block by block."""

    def pieces(self) -> Iterator[Piece]:
        size, start = self.path.stat().st_size, 0
        with self.path.open("rb") as file:
            while start < size:
                file.seek(start + PIECE_BYTES - 1)  # a line that ends just there stays in this piece
                _pass_line(file)
                stop = min(file.tell(), size)
                yield Piece(start, stop)
                start = stop

    def scan(self, piece: Piece) -> Iterator[tuple[Place, Any]]:
        with self.path.open("rb", buffering=BLOCK) as file:
            file.seek(piece.start)
            at = piece.start
            while at < piece.stop and (line := file.readline(self.max_bytes + 2)):  # with its end
                size, is_blank = len(line), not line.strip()
                if size > self.max_bytes + 1 and line[-1:] != b"\n":
                    rest, rest_is_blank = _pass_line(file)
                    size, is_blank = size + rest, is_blank and rest_is_blank
                if not is_blank:
                    yield Place(at, size), self._parse(line, at) if size == len(line) else self._too_large(at, size)
                at += size

    def read(self, place: Place) -> Any:
        if place.size > self.max_bytes + 2:
            return self._too_large(*place)
        return self._parse(self._bytes(place), place.at)

    def _too_large(self, at: int, size: int) -> Malformed:
        return too_many_bytes(size, self.max_bytes, f"a line from byte {at} on")

    def _parse(self, line: bytes, at: int) -> Any:
        if len(line) > self.max_bytes and len(line.rstrip(b"\r\n")) > self.max_bytes:
            return self._too_large(at, len(line))
        try:
            return parse_record(line.removeprefix(codecs.BOM_UTF8) if at == 0 else line, at)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            line_number = line_and_column(self.path, at).partition(",")[0]
            what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(f"{self.path}, {line_number}: not JSON ({what})") from error


def _pass_line(file: BinaryIO) -> tuple[int, bool]:
    """Go to the end of the line: how many bytes that took, and whether they are all white space."""
    size, is_blank = 0, True
    while block := file.readline(BLOCK):
        size += len(block)
        is_blank = is_blank and not block.strip()
        if block[-1:] == b"\n":
            break
    return size, is_blank


class JsonList(Reader):
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
            return too_many_bytes(place.size, self.max_bytes, f"from byte {place.at} on")
        try:
            return parse_record(self._bytes(place), place.at)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            where = line_and_column(self.path, place.at)
            raise ValueError(f"{self.path}, byte {place.at}, {where}: not JSON ({error})") from error

    def _elements(self, start: int, stop: int | None) -> Iterator[tuple[Place, Any]]:
        """Elements of the list from byte ``start`` to ``stop``; of the whole file if that is ``None``."""
        with closing(_Window(self.path, start, stop)) as text:
            yield from self._in(text, whole=stop is None)

    def _in(self, text: _Window, whole: bool) -> Iterator[tuple[Place, Any]]:
        if whole:
            first = text.peek()
            if first != "[":
                text.parse()  # not JSON at all has an error of its own
                kind = {"{": "dict", '"': "str"}.get(first, "value")
                lines = "; if each line holds a record, name it .jsonl" if first == "{" else ""
                raise ValueError(f"data file {self.path} holds a {kind}, not a list of conversations{lines}")
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
                raise text.error("the list has no end")
            text.skip()
            if text.peek():
                raise text.error("something stands after the list")


class _End:
    """Looks for the end of a list, an object or a text, in UTF-8 and block by block: what stands between quotes and how
    deep it is nested is computed for a whole block at once, so that no content of a value makes it slow."""

    def __init__(self) -> None:
        self._quoted, self._backslashes, self._depth = False, 0, 0

    def within(self, block: bytes) -> int | None:
        """Bytes of ``block`` up to the end of the value; ``None`` if it goes on after it."""
        if self._quoted and b'"' not in block:  # as nearly all of a long text
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
        """[letters] bool: an even number of backslashes stands before it, so that it is not escaped."""
        if not self._backslashes and b"\\" not in block:
            return np.ones(len(letters), dtype=bool)
        places = np.arange(len(letters), dtype=np.int32)
        others = np.maximum.accumulate(np.where(letters != ord("\\"), places, -1))  # the last that is none
        before = np.concatenate([[-1], others[:-1]])
        runs = places - 1 - before + np.where(before < 0, self._backslashes, 0)
        self._backslashes = (len(letters) - 1 - int(others[-1]) + (self._backslashes if others[-1] < 0 else 0)) % 2
        return runs % 2 == 0


class _EndOfNumber:
    """The same for a number, which ends where something else begins."""

    def within(self, block: bytes) -> int | None:
        size = len(block) - len(block.lstrip(b"+-.0123456789Ee"))
        return size if size < len(block) else None


_LARGE = object()  # in place of a value that was passed over: it is large, or cannot be parsed


class _Window:
    """A moving view of a file's text; ``at`` is the byte in the file where the reader stands."""

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
        """``message`` with its place, ``beyond`` characters after the next one."""
        at = self.at + len(self._text[self._position : self._position + beyond].encode())
        return ValueError(f"{self.path}: not JSON ({message}, at byte {at}: {line_and_column(self.path, at)})")

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
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
        """The value that begins here; ``_LARGE`` for one that was passed over."""
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                if len(self._text) - self._position >= PARSED_BLOCKS * BLOCK:
                    return self._pass_over(error.msg, error.pos - self._position)
                if not self._more(BLOCK):
                    raise self.error(error.msg, error.pos - self._position) from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, too deep a nesting
                return self._pass_over(str(error))
            else:
                if end < len(self._text) or not self._more(BLOCK):  # a number could go on in the next block
                    self._move(end)
                    return value

    def _pass_over(self, message: str, beyond: int = 0) -> Any:
        """Go to the end of the value that begins here, keeping nothing of it; ``message`` says why it cannot be parsed,
        for the error where it has no end."""
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
        """Read on; false at the end."""
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
