"""The sample index: which records of which sources are trained on, and every sample's lengths, on disk.

Reading and measuring the records is the work of :mod:`vtprune_train.data.table`, kept by the content that would change
the lengths. What is left of them after ``take`` and the limits is a *selection*: the rows that can be used, kept beside
the table. A start reads these files once, to compare their checksums; from then on they are mapped into memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from vtprune_train.core.rounding import floor_of
from vtprune_train.data.building import VERSION
from vtprune_train.data.chat import ChatEncoder
from vtprune_train.data.images import MAX_PIXELS
from vtprune_train.data.measure import FINE, LARGE, SILENT, Measure
from vtprune_train.data.order import EpochOrder, permuted
from vtprune_train.data.records import NO_PROMPT, Conversation, Prompt
from vtprune_train.data.sources import BOUNDS, Bounds, find_files
from vtprune_train.data.table import Table, open_table
from vtprune_train.files.checksums import SummedFile, Watch, damage, read_manifest, seal
from vtprune_train.files.disk import locked, publish, remove
from vtprune_train.models.families.layout import ImageLayout, Size

log = logging.getLogger(__name__)

SHOWN = 5
ROWS = 1 << 20  # looked at together
TO_MEND = "Shorten or split them, raise the setting that is named, or set data.too_long=skip to leave them out"


@dataclass(frozen=True)
class Source:
    """One entry of the data: a path (see :func:`vtprune_train.data.sources.find_files`) and its folder of images;
    ``take`` is ``all``, ``first:N`` or ``random:N``, ``weight`` its share of an epoch, ``name`` what it is called in
    sample ids instead of its number, ``ignore`` fields and marks of its records that change nothing (see
    :mod:`vtprune_train.data.fields`)."""

    path: Path
    images: Path
    take: str = "all"
    weight: float = 1.0
    prompt: Prompt = NO_PROMPT
    name: str = ""
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lengths:
    """What some samples measure: ``text``, ``supervised`` [S]; ``span_tokens``, ``span_tiles`` and ``span_sample``
    (a position among these samples) [pictures]; all int64."""

    text: np.ndarray
    supervised: np.ndarray
    span_tokens: np.ndarray
    span_tiles: np.ndarray
    span_sample: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """[S] tokens of each sample before dropping."""
        return self.text + self._sum(self.span_tokens)

    @property
    def tiles(self) -> np.ndarray:
        """[S] tiles (or patches) that the tower sees."""
        return self._sum(self.span_tiles)

    def _sum(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.span_sample, weights=values, minlength=len(self.text)).astype(np.int64)


class Selection:
    """The records of a table that are samples, in order. ``manifest`` holds ``samples``, ``longest``, ``tokens``,
    ``bad``, ``too_long``, ``unsupervised`` and a ``digest`` of the samples' content."""

    def __init__(self, table: Table, folder: Path):
        self.table, self.folder = table, folder
        self.manifest = read_manifest(folder)
        self._watch = Watch(folder, self.manifest["sums"])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "rows"}

    def __len__(self) -> int:
        return self.manifest["samples"]

    def check(self) -> None:
        """Look whether its files and those of its table are what they were when they were opened.

        Raises:
            RuntimeError: one was changed in place.
        """
        self.table.check()
        if name := self._watch.changed():
            raise RuntimeError(
                f"{self.folder / name} was changed while it was in use; start again to make a new selection"
            )

    @cached_property
    def rows(self) -> np.ndarray:
        """[samples] int64, memory-mapped."""
        return np.memmap(self.folder / "rows.bin", np.int64, "r") if len(self) else np.zeros(0, dtype=np.int64)


@dataclass
class SampleIndex:
    """The samples of all sources, numbered through.

    Args:
        sources: what was asked for.
        selections: the samples of each source.
        seed: of the run; decides the order together with the epoch.
    """

    PAUSE: ClassVar = 50  # between two looks at the files, in times of what a look takes: file systems differ

    sources: list[Source]
    selections: list[Selection]
    seed: int

    def __post_init__(self) -> None:
        self._next_look = 0.0
        self._starts = np.cumsum([0, *(len(selection) for selection in self.selections)]).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def bad(self) -> int:
        """Records left out because they cannot be used."""
        return sum(selection.manifest["bad"] for selection in self.selections)

    @property
    def too_long(self) -> int:
        """Samples left out for their length or their bytes."""
        return sum(s.manifest["too_long"] + s.manifest["too_large"] for s in self.selections)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample, before dropping."""
        return max((selection.manifest["longest"] for selection in self.selections), default=0)

    @property
    def total_tokens(self) -> int:
        """Tokens of all samples together, before dropping."""
        return sum(selection.manifest["tokens"] for selection in self.selections)

    def order(self) -> EpochOrder:
        """Which samples an epoch holds, by the sources' weights."""
        sizes = [len(selection) for selection in self.selections]
        return EpochOrder(sizes, self.seed, [source.weight for source in self.sources])

    def identity(self) -> str:
        """Number and hash of all samples, in order: equal for equal sets of samples with equal texts."""
        digests = "".join(selection.manifest["digest"] for selection in self.selections)
        return f"{len(self)}:{hashlib.sha256(digests.encode()).hexdigest()[:16]}"

    def locate(self, sample: int) -> tuple[int, int]:
        """``(source, row)`` of a sample."""
        if not 0 <= sample < len(self):
            raise IndexError(f"there is no sample {sample} among {len(self)}")
        self._look_at_files()
        source = bisect_right(self._starts, sample) - 1
        return source, int(self.selections[source].rows[sample - self._starts[source]])

    def sample_id(self, sample: int) -> str:
        """``source:row:id``, unique within the run and the same on every machine."""
        source, row = self.locate(sample)
        return f"{self.sources[source].name or source}:{row}:{self.selections[source].table.id(row)}"

    def record(self, sample: int) -> Conversation:
        """The conversation as it is trained on, its source's prompt included.

        Raises:
            RuntimeError: the data file has changed since the index was opened.
        """
        source, row = self.locate(sample)
        return self.sources[source].prompt.apply(self.selections[source].table.read(row))

    def distrusted(self, sample: int, reason: str) -> RuntimeError:
        """See :meth:`vtprune_train.data.table.Table.distrusted`: of the table that a sample is in."""
        return self.selections[self.locate(sample)[0]].table.distrusted(reason)

    def pictures(self, sample: int, record: Conversation) -> list[Path | bytes]:
        """Where the pictures of a sample are read from."""
        return record.pictures(self.sources[self.locate(sample)[0]].images)

    def picture_sizes(self, sample: int) -> list[Size]:
        """``(height, width)`` of each picture, as indexed."""
        source, row = self.locate(sample)
        table = self.selections[source].table
        spans = table.spans(row)
        return list(zip(table.column("height")[spans].tolist(), table.column("width")[spans].tolist(), strict=True))

    def _look_at_files(self) -> None:
        """Now and then, whether they are what they were when they were opened.

        Raises:
            RuntimeError: one was changed in place.
        """
        began = time.monotonic()
        if began < self._next_look:
            return
        for selection in self.selections:
            selection.check()
        ended = time.monotonic()
        self._next_look = ended + self.PAUSE * (ended - began)

    def num_pictures(self, samples: np.ndarray) -> np.ndarray:
        """[S] pictures of each sample."""
        return np.bincount(self.lengths(samples).span_sample, minlength=len(samples))

    def lengths(self, samples: Sequence[int] | np.ndarray) -> Lengths:
        """The lengths of some samples; nothing is read of the others."""
        self._look_at_files()
        samples = np.asarray(samples, dtype=np.int64)
        source = np.searchsorted(self._starts, samples, side="right") - 1
        text, supervised, first, num = (np.zeros(len(samples), dtype=np.int64) for _ in range(4))
        for number in np.unique(source).tolist():
            own = source == number
            selection = self.selections[number]
            rows = selection.rows[samples[own] - self._starts[number]]
            starts = selection.table.column("span_starts")
            first[own], num[own] = starts[rows], starts[rows + 1] - starts[rows]
            text[own], supervised[own] = (
                selection.table.column("text")[rows],
                selection.table.column("supervised")[rows],
            )
        span_sample = np.repeat(np.arange(len(samples)), num)
        place = np.arange(len(span_sample)) - np.repeat(np.cumsum(num) - num - first, num)
        tokens, tiles = np.zeros_like(place), np.zeros_like(place)
        for number in np.unique(source).tolist():
            own = source[span_sample] == number
            table = self.selections[number].table
            tokens[own], tiles[own] = table.column("tokens")[place[own]], table.column("tiles")[place[own]]
        return Lengths(text, supervised, tokens, tiles, span_sample)


def build_index(
    sources: Sequence[Source],
    encoder: ChatEncoder,
    layout: ImageLayout,
    *,
    max_length: int,
    too_long: Literal["error", "skip"],
    max_bad: int,
    seed: int,
    workers: int,
    cache_dir: Path,
    unsupervised: Literal["error", "skip"] = "error",
    max_image_pixels: int = MAX_PIXELS,
    max_bad_share: float = 1.0,
    bounds: Bounds = BOUNDS,
) -> SampleIndex:
    """Index all sources. Ranks of one machine wait for the first to build; the others open what it wrote.

    Raises:
        ValueError: a file cannot be read, more records are unusable than ``max_bad`` (of one
            source: than the share ``max_bad_share``) or all of a source, a sample is longer than
            ``max_length`` or has more bytes than ``bounds`` and ``too_long`` is ``error``, or has nothing to learn and
            ``unsupervised`` is ``error``; names the first such ids.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    selections = []
    with locked(cache_dir / "index.lock"):
        for number, source in enumerate(sources):
            measure = Measure(encoder, layout, source.images, source.prompt, source.ignore, max_image_pixels, bounds)
            folder = cache_dir / f"index-{_slot(source, measure)}"
            table = open_table(folder, find_files(source.path), measure, workers)
            selections.append(_select(table, take=source.take, seed=seed + number, max_length=max_length))
    _report_unsupervised(selections, unsupervised)
    _report_large(sources, selections, too_long)
    _report(sources, selections, max_bad, max_bad_share, max_length, too_long)
    return SampleIndex(list(sources), selections, seed)


def _slot(source: Source, measure: Measure) -> str:
    """Where a source's table is kept: files that change come to the same place."""
    content = json.dumps([VERSION, str(source.path.resolve()), measure.fingerprint()], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _select(table: Table, *, take: str, seed: int, max_length: int) -> Selection:
    """The selection for these settings, made once and kept in the table's folder."""
    drawn = seed if take.startswith("random") else None
    key = json.dumps([table.manifest["generation"], take, drawn, max_length])
    folder = table.folder / f"selection-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    of = [table.folder.name, table.manifest["sums"]["content.npy"]]
    reason = _unusable(folder, of) if folder.exists() else ""
    if reason:
        log.warning("the selection in %s is damaged (%s); selecting again", folder, reason)
    if reason or not folder.exists():
        temporary = table.folder / "selection.tmp"
        remove(temporary)
        temporary.mkdir()
        _write_rows(table, take, seed, max_length, temporary, of)
        publish(temporary, folder)
    return Selection(table, folder)


def _unusable(folder: Path, of: list[Any]) -> str:
    """What is wrong with a selection of the table that ``of`` says; empty if nothing is."""
    if what := damage(folder):
        return what
    return "" if read_manifest(folder).get("of", of) == of else "it belongs to another index"


def _write_rows(table: Table, take: str, seed: int, max_length: int, folder: Path, of: list[Any]) -> None:
    """Write the rows that can be used to ``rows.bin``, those that are broken to ``bad.bin`` (int64), and to the
    manifest what the usable ones measure together, a digest of their content, and ``of``: of which table they are."""
    digest = hashlib.sha256()
    counts = {"samples": 0, "longest": 0, "tokens": 0, "bad": 0, "too_long": 0, "too_large": 0, "unsupervised": 0}
    large: list[int] = []
    long: list[list[int]] = []
    silent: list[int] = []
    with SummedFile(folder / "rows.bin") as kept, SummedFile(folder / "bad.bin") as bad:
        for rows in _take(take, len(table), seed):
            lengths = _tokens(table, rows)
            state = table.column("state")[rows]
            fine, is_silent, is_large = state == FINE, state == SILENT, state == LARGE
            is_long = fine & (lengths > max_length)
            long += np.stack([rows, lengths], axis=1)[is_long][: 2 * SHOWN - len(long)].tolist()
            keep, kept_lengths = rows[fine & ~is_long], lengths[fine & ~is_long]
            kept.write(keep.tobytes())
            is_bad = ~fine & ~is_silent & ~is_large
            large += rows[is_large][: 2 * SHOWN - len(large)].tolist()
            silent += rows[is_silent][: 2 * SHOWN - len(silent)].tolist()
            bad.write(rows[is_bad].tobytes())
            digest.update(keep.tobytes() + table.column("content")[keep].tobytes())
            counts["samples"] += len(keep)
            counts["longest"] = max(counts["longest"], int(kept_lengths.max(initial=0)))
            counts["tokens"] += int(kept_lengths.sum())
            counts["bad"] += int(is_bad.sum())
            counts["unsupervised"] += int(is_silent.sum())
            counts["too_long"] += int(is_long.sum())
            counts["too_large"] += int(is_large.sum())
    first = {"first_too_long": long, "first_too_large": large, "first_unsupervised": silent}
    sums = {file.path.name: file.sums for file in (kept, bad)}
    seal(folder, {**counts, **first, "digest": digest.hexdigest(), "of": of}, sums)


def _tokens(table: Table, rows: np.ndarray) -> np.ndarray:
    """[rows] tokens of records in order, before dropping."""
    starts, tokens = table.column("span_starts"), table.column("tokens")
    first, end = starts[rows], starts[rows + 1]
    begin = int(first[0]) if len(rows) else 0
    sums = np.cumsum(np.concatenate([[0], tokens[begin : int(end[-1])] if len(rows) else []]), dtype=np.int64)
    return table.column("text")[rows] + sums[end - begin] - sums[first - begin]


def _take(take: str, count: int, seed: int) -> Iterator[np.ndarray]:
    """The rows asked for, in order, some at a time."""
    kind, _, number = take.partition(":")
    wanted = count if kind == "all" else min(int(number), count)
    drawn = np.sort(permuted(np.arange(wanted), count, [seed])) if kind == "random" else None
    for start in range(0, wanted, ROWS):
        stop = min(start + ROWS, wanted)
        yield np.arange(start, stop) if drawn is None else drawn[start:stop]


def _report(
    sources: Sequence[Source],
    selections: Sequence[Selection],
    max_bad: int,
    max_bad_share: float,
    max_length: int,
    too_long: str,
) -> None:
    """Say what is left out or not read, or raise."""
    for source, selection in zip(sources, selections, strict=True):
        table = selection.table
        if table.manifest["duplicates"]:
            row = table.manifest["duplicate_rows"][0]
            log.warning(
                "%s: %d record(s) have the id of another one (first: %s); each is a sample of its own",
                source.path, table.manifest["duplicates"], table.id(row),
            )  # fmt: skip
        if unread := table.manifest["unread"]:
            log.warning("%s: fields that are not read: %s", source.path, shown_fields(unread))
        wanted = source.take.partition(":")[2]
        if wanted and int(wanted) > len(table):
            log.warning(
                "%s: take=%s asks for more than its %d record(s); all are taken", source.path, source.take, len(table)
            )
    num_bad = sum(selection.manifest["bad"] for selection in selections)
    if num_bad > max_bad:
        raise ValueError(
            f"{num_bad} records cannot be used, more than data.max_bad={max_bad}; mend them or raise it. "
            f"First: {'; '.join(_first_bad(selections, SHOWN))}"
        )
    for source, selection in zip(sources, selections, strict=True):
        _check_bad(source, selection, max_bad_share)
    if num_bad:
        for line in _first_bad(selections, num_bad):
            log.warning("left out: %s", line)
        log.warning("%d record(s) cannot be used and are left out (data.max_bad=%d)", num_bad, max_bad)
    num_long = sum(selection.manifest["too_long"] for selection in selections)
    first = [(s.table.id(row), n) for s in selections for row, n in s.manifest["first_too_long"]]
    shown = ", ".join(f"{name} ({n})" for name, n in first[: 2 * SHOWN])
    if num_long and too_long == "error":
        raise ValueError(
            f"{num_long} sample(s) are longer than data.max_length={max_length} tokens (visual tokens counted "
            f"before dropping; samples are never cut). Raise it or set data.too_long=skip. First: {shown}"
        )
    if num_long:
        log.warning("%d sample(s) longer than data.max_length=%d are skipped. First: %s", num_long, max_length, shown)
    for source, selection in zip(sources, selections, strict=True):
        if not len(selection):
            raise ValueError(f"data file {source.path} has no record left that can be used; take the entry out")


def most_bad(share: float, records: int) -> int:
    """How many of so many records may be left out by ``data.max_bad_share``; one always."""
    return max(1, floor_of(share, records))


def _check_bad(source: Source, selection: Selection, share: float) -> None:
    """One source's share of records that cannot be used.

    Raises:
        ValueError: there are too many, or no others; with the counts and the first reasons.
    """
    counts = selection.manifest
    bad, taken = counts["bad"], sum(counts[key] for key in ("samples", "bad", "too_long", "too_large", "unsupervised"))
    if not bad or (bad < taken and bad <= most_bad(share, taken)):
        return
    many = f"{bad} of its {taken} records cannot be used, more than data.max_bad_share={share:g}; mend them or raise it"
    none = f"none of its {taken} records can be used; mend them"
    raise ValueError(
        f"data file {source.path} (images in {source.images}): {none if bad == taken else many}. "
        f"First: {'; '.join(_first_bad([selection], SHOWN))}"
    )


def shown_fields(unread: Mapping[str, int]) -> str:
    """Names of fields and in how many records they are, for a message."""
    return ", ".join(f"{name!r} ({count})" for name, count in unread.items())


def _report_unsupervised(selections: Sequence[Selection], policy: str) -> None:
    """Say which samples have nothing to learn, or raise."""
    count = sum(selection.manifest["unsupervised"] for selection in selections)
    shown = ", ".join([s.table.id(row) for s in selections for row in s.manifest["first_unsupervised"]][: 2 * SHOWN])
    if count and policy == "error":
        raise ValueError(
            f"{count} sample(s) have no supervised token: their conversations have no answer to learn from. Mend them "
            f"or set data.unsupervised=skip. First: {shown}"
        )
    if count:
        log.warning("%d sample(s) without a supervised token are skipped. First: %s", count, shown)


def _report_large(sources: Sequence[Source], selections: Sequence[Selection], policy: str) -> None:
    """Say which records have too many bytes to be read or tokenized, or raise."""
    count = sum(selection.manifest["too_large"] for selection in selections)
    shown = "; ".join(
        f"{source.path}: {line}"
        for source, selection in zip(sources, selections, strict=True)
        for line in _errors(selection, selection.manifest["first_too_large"])
    )
    if count and policy == "error":
        raise ValueError(f"{count} record(s) are too large. {TO_MEND}. First: {shown}")
    if count:
        log.warning("%d record(s) are too large and are skipped (data.too_long=skip). First: %s", count, shown)


def _first_bad(selections: Sequence[Selection], wanted: int) -> list[str]:
    """``id: error`` of the first records that cannot be used."""
    lines: list[str] = []
    for selection in selections:
        lines += _errors(selection, np.fromfile(selection.folder / "bad.bin", np.int64, wanted - len(lines)).tolist())
    return lines


def _errors(selection: Selection, rows: Sequence[int]) -> list[str]:
    """``id: error`` of some records that cannot be used."""
    if not rows:
        return []
    table, wanted = selection.table, set(rows)
    found = (entry for entry in table.errors() if entry["row"] in wanted)
    return [f"{table.id(entry['row'])}: {entry['error']}" for entry in islice(found, len(wanted))]
