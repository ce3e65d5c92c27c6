"""The samples of one table: the records that ``take`` and the limits select, stored beside the table."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vtprune_train.data.measure import FINE, LARGE, SILENT
from vtprune_train.data.order import permuted
from vtprune_train.data.table import Table
from vtprune_train.files.checksums import SummedFile, Watch, damage, read_manifest, seal
from vtprune_train.files.disk import publish, remove

log = logging.getLogger(__name__)

ROWS = 1 << 20  # rows processed at a time
NAMED = 10  # maximum records of each kind in a message


class Selection:
    """The samples of a table, in order. ``manifest`` has the numbers ``samples``, ``longest``, ``tokens``, ``bad``,
    ``too_long``, ``too_large`` and ``unsupervised``, the first records of the last three kinds (``first_too_long`` ...)
    and a ``digest`` of the samples' content."""

    def __init__(self, table: Table, folder: Path):
        self.table, self.folder = table, folder
        self.manifest = read_manifest(folder)
        self._watch = Watch(folder, self.manifest["sums"])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "rows"}

    def __len__(self) -> int:
        return self.manifest["samples"]

    def check(self) -> None:
        """Raise ``RuntimeError`` if a file of the selection or of its table was changed since it was opened."""
        self.table.check()
        if name := self._watch.changed():
            raise RuntimeError(
                f"{self.folder / name} was changed while it was in use; start again to rebuild the selection"
            )

    @cached_property
    def rows(self) -> np.ndarray:
        """[samples] int64, memory-mapped."""
        return np.memmap(self.folder / "rows.bin", np.int64, "r") if len(self) else np.zeros(0, dtype=np.int64)


def select(table: Table, *, take: str, seed: int, max_length: int) -> Selection:
    """The selection for these settings, built once and stored in the table's folder."""
    draw_seed = seed if take.startswith("random") else None
    key = json.dumps([table.manifest["generation"], take, draw_seed, max_length])
    folder = table.folder / f"selection-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    of = [table.folder.name, table.manifest["sums"]["content.npy"]]
    if folder.exists():
        reason = damage(folder)
        if not reason and read_manifest(folder).get("of", of) != of:
            reason = "it belongs to another index"
        if not reason:
            return Selection(table, folder)
        log.warning("the selection in %s is damaged (%s); selecting again", folder, reason)
    temporary = table.folder / "selection.tmp"
    remove(temporary)
    temporary.mkdir()
    _write(table, take, seed, max_length, temporary, of)
    publish(temporary, folder)
    return Selection(table, folder)


def _write(table: Table, take: str, seed: int, max_length: int, folder: Path, of: list[Any]) -> None:
    """Write the usable rows to ``rows.bin`` and the bad ones to ``bad.bin`` (int64); write the counts, a digest of the
    samples' content, and ``of`` (the identity of the table) to the manifest."""
    digest = hashlib.sha256()
    counts = {"samples": 0, "longest": 0, "tokens": 0, "bad": 0, "too_long": 0, "too_large": 0, "unsupervised": 0}
    first: dict[str, list[Any]] = {"first_too_long": [], "first_too_large": [], "first_unsupervised": []}
    with SummedFile(folder / "rows.bin") as kept, SummedFile(folder / "bad.bin") as bad:
        for rows in _take(take, len(table), seed):
            lengths = _tokens(table, rows)
            state = table.column("state")[rows]
            is_long = (state == FINE) & (lengths > max_length)
            is_kept = (state == FINE) & ~is_long
            left_out = {"too_long": is_long, "too_large": state == LARGE, "unsupervised": state == SILENT}
            is_bad = ~np.isin(state, (FINE, LARGE, SILENT))
            kept.write(rows[is_kept].tobytes())
            bad.write(rows[is_bad].tobytes())
            digest.update(rows[is_kept].tobytes() + table.column("content")[rows[is_kept]].tobytes())
            counts["samples"] += int(is_kept.sum())
            counts["longest"] = max(counts["longest"], int(lengths[is_kept].max(initial=0)))
            counts["tokens"] += int(lengths[is_kept].sum())
            counts["bad"] += int(is_bad.sum())
            for reason, where in left_out.items():
                counts[reason] += int(where.sum())
                named = first[f"first_{reason}"]
                entries = np.stack([rows, lengths], axis=1) if reason == "too_long" else rows
                named += entries[where][: NAMED - len(named)].tolist()
    sums = {file.path.name: file.sums for file in (kept, bad)}
    seal(folder, {**counts, **first, "digest": digest.hexdigest(), "of": of}, sums)


def _tokens(table: Table, rows: np.ndarray) -> np.ndarray:
    """[rows] tokens of the records at ascending ``rows``, before dropping."""
    starts, tokens = table.column("span_starts"), table.column("tokens")
    first, end = starts[rows], starts[rows + 1]
    begin = int(first[0]) if len(rows) else 0
    sums = np.cumsum(np.concatenate([[0], tokens[begin : int(end[-1])] if len(rows) else []]), dtype=np.int64)
    return table.column("text")[rows] + sums[end - begin] - sums[first - begin]


def _take(take: str, count: int, seed: int) -> Iterator[np.ndarray]:
    """The rows that ``take`` selects, ascending, ``ROWS`` at a time."""
    kind, _, number = take.partition(":")
    num_rows = count if kind == "all" else min(int(number), count)
    drawn = np.sort(permuted(np.arange(num_rows), count, [seed])) if kind == "random" else None
    for start in range(0, num_rows, ROWS):
        stop = min(start + ROWS, num_rows)
        yield np.arange(start, stop) if drawn is None else drawn[start:stop]
