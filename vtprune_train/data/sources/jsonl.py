"""JSONL: one record a line, cut into pieces at line ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vtprune_train.data.sources.base import (
    BLOCK,
    BOUNDS,
    PIECE_BYTES,
    BytesAt,
    Malformed,
    Piece,
    Place,
    Reader,
    line_and_column,
    too_many_bytes,
    too_many_values,
    unparsed,
)


class Jsonl(Reader):
    """Empty lines are no records. A line of too many bytes is passed over block by block."""

    def __init__(self, path: Path, max_bytes: int = BOUNDS.record):
        super().__init__(path, max_bytes)
        self._bytes = BytesAt(path)

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
        return self._parse(self._bytes.read(*place), place.at)

    def _too_large(self, at: int, size: int) -> Malformed:
        return too_many_bytes(size, self.max_bytes, f"a line from byte {at} on")

    def _parse(self, line: bytes, at: int) -> Any:
        if len(line) > self.max_bytes and len(line.rstrip(b"\r\n")) > self.max_bytes:
            return self._too_large(at, len(line))
        if (too_many := too_many_values(line, at)) is not None:
            return too_many
        try:
            return json.loads(line.removeprefix(b"\xef\xbb\xbf") if at == 0 else line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            line_number = line_and_column(self.path, at).partition(",")[0]
            what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(f"{self.path}, {line_number}: not JSON ({what})") from error
        except (ValueError, RecursionError) as error:
            return unparsed(error)


def _pass_line(file: BinaryIO) -> tuple[int, bool]:
    """Go to the end of the line: how many bytes that took, and whether they are all white space."""
    size, is_blank = 0, True
    while block := file.readline(BLOCK):
        size += len(block)
        is_blank = is_blank and not block.strip()
        if block[-1:] == b"\n":
            break
    return size, is_blank
