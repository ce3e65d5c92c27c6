"""JSONL: one record a line, cut into pieces at line ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtprune_train.data.sources.base import PIECE_BYTES, BytesAt, Piece, Place, Reader, line_and_column


class Jsonl(Reader):
    """Empty lines are no records."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._bytes = BytesAt(path)

    def pieces(self) -> Iterator[Piece]:
        size, start = self.path.stat().st_size, 0
        with self.path.open("rb") as file:
            while start < size:
                file.seek(start + PIECE_BYTES - 1)  # a line that ends just there stays in this piece
                file.readline()
                stop = min(file.tell(), size)
                yield Piece(start, stop)
                start = stop

    def scan(self, piece: Piece) -> Iterator[tuple[Place, Any]]:
        with self.path.open("rb") as file:
            file.seek(piece.start)
            at = piece.start
            while at < piece.stop and (line := file.readline()):
                if line.strip():
                    yield Place(at, len(line)), self._parse(line, at)
                at += len(line)

    def read(self, place: Place) -> Any:
        return self._parse(self._bytes.read(*place), place.at)

    def _parse(self, line: bytes, at: int) -> Any:
        try:
            return json.loads(line.removeprefix(b"\xef\xbb\xbf") if at == 0 else line)
        except (ValueError, RecursionError) as error:  # not UTF-8 included
            line_number = line_and_column(self.path, at).partition(",")[0]
            what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(f"{self.path}, {line_number}: not JSON ({what})") from error
