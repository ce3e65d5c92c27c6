"""JSON: a list of records, parsed one at a time so that the file never has to fit into memory.

Streaming parsers do not tell at which byte an element begins and ends, by which it is read again; the standard
library's decoder, fed block by block, does.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from vtprune_train.data.sources.base import PIECE_BYTES, BytesAt, Piece, Place, Reader, line_and_column

BLOCK = 1 << 20
LARGEST_RECORD = 64 << 20  # characters; a missing quote would have us read on to the end of the file
_SPACE = re.compile(r"[ \t\r\n]*")


class JsonList(Reader):
    def __init__(self, path: Path):
        super().__init__(path)
        self._bytes = BytesAt(path)

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
        try:
            return json.loads(self._bytes.read(*place))
        except ValueError as error:
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
            yield Place(at, text.at - at), value
            separator = ","
        if whole:
            if following != "]":
                raise text.error("the list has no end")
            text.skip()
            if text.peek():
                raise text.error("something stands behind the list")


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
        """The value that begins here."""
        block = BLOCK
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                if len(self._text) - self._position > LARGEST_RECORD or not self._more(block):
                    raise self.error(error.msg, error.pos - self._position) from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, too deep a nesting
                raise self.error(str(error)) from error
            else:
                if end < len(self._text) or not self._more(block):  # a number could go on in the next block
                    self._move(end)
                    return value
            block *= 2

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
