"""The sample index: the records that are trained on, and the lengths of every sample, on disk.

:mod:`vtprune_train.data.table` reads and measures records, :mod:`vtprune_train.data.selection` selects samples by
``take`` and the limits. At the start of a run the files are read once to verify their checksums; afterwards they are
memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from vtprune_train.core.rounding import floor_of
from vtprune_train.data.building import VERSION
from vtprune_train.data.chat import ChatEncoder
from vtprune_train.data.images import MAX_PIXELS, UNREADABLE
from vtprune_train.data.measure import Measure
from vtprune_train.data.order import EpochOrder
from vtprune_train.data.records import NO_PROMPT, Conversation, Prompt
from vtprune_train.data.selection import NAMED, Selection, select
from vtprune_train.data.sources import find_files
from vtprune_train.data.sources.base import BOUNDS, Bounds
from vtprune_train.data.table import open_table
from vtprune_train.data.video_errors import ChangedVideo
from vtprune_train.data.visuals import VisualFile
from vtprune_train.files.disk import locked
from vtprune_train.models.families.layout import ImageLayout, Visual

log = logging.getLogger(__name__)

NAMED_BAD = 5  # bad records that an error names
HOW_TO_FIX = "Shorten or split them, raise that limit, or set data.too_long=skip to leave them out"


@dataclass(frozen=True)
class Source:
    """One entry of the data: a path (see :func:`vtprune_train.data.sources.find_files`) and its folder of images.
    ``take`` is ``all``, ``first:N`` or ``random:N``; ``weight`` is the number of passes per epoch; ``name`` replaces
    the entry's number in sample ids; ``ignore`` lists fields and markers that are accepted (see
    :mod:`vtprune_train.data.fields`); ``reader`` is the path of a reader outside the package."""

    path: Path
    images: Path
    take: str = "all"
    weight: float = 1.0
    prompt: Prompt = NO_PROMPT
    name: str = ""
    ignore: tuple[str, ...] = ()
    reader: str = ""
    videos: Path | None = None


@dataclass(frozen=True)
class Lengths:
    """Lengths of a set of samples: ``text`` and ``supervised`` tokens [S]; ``span_tokens``, ``span_tiles``,
    ``span_frames`` (steps in time of a video, 0 for an image) and ``span_sample`` (position in the set) [images and
    videos]; all int64."""

    text: np.ndarray
    supervised: np.ndarray
    span_tokens: np.ndarray
    span_tiles: np.ndarray
    span_frames: np.ndarray
    span_sample: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """[S] tokens of each sample before dropping."""
        return self.text + self._sum(self.span_tokens)

    @property
    def tiles(self) -> np.ndarray:
        """[S] tiles (or patches) of each sample that the vision tower processes."""
        return self._sum(self.span_tiles)

    def _sum(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.span_sample, weights=values, minlength=len(self.text)).astype(np.int64)


@dataclass
class SampleIndex:
    """The samples of all sources, numbered consecutively.

    Args:
        sources: entries of the data.
        selections: the samples of each source.
        seed: the run's seed, which determines the order together with the epoch.
    """

    PAUSE: ClassVar = 50  # time between two checks of the files, as a multiple of a check's duration

    sources: list[Source]
    selections: list[Selection]
    seed: int

    def __post_init__(self) -> None:
        self._next_check = 0.0
        self._starts = np.cumsum([0, *(len(selection) for selection in self.selections)]).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def bad(self) -> int:
        """Number of records that are left out because they cannot be used."""
        return _total(self.selections, "bad")

    @property
    def longest(self) -> int:
        """Tokens of the longest sample, before dropping."""
        return max((selection.manifest["longest"] for selection in self.selections), default=0)

    @property
    def total_tokens(self) -> int:
        """Tokens of all samples together, before dropping."""
        return _total(self.selections, "tokens")

    def order(self) -> EpochOrder:
        """The order of the samples in each epoch, by the sources' weights."""
        sizes = [len(selection) for selection in self.selections]
        return EpochOrder(sizes, self.seed, [source.weight for source in self.sources])

    def identity(self) -> str:
        """Number and hash of all samples, in order: equal if the samples have equal texts."""
        digests = "".join(selection.manifest["digest"] for selection in self.selections)
        return f"{len(self)}:{hashlib.sha256(digests.encode()).hexdigest()[:16]}"

    def locate(self, sample: int) -> tuple[int, int]:
        """``(source, row)`` of a sample."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} is out of range for {len(self)} samples")
        self._check_files()
        source = bisect_right(self._starts, sample) - 1
        return source, int(self.selections[source].rows[sample - self._starts[source]])

    def sample_id(self, sample: int) -> str:
        """``source:row:id``, unique within the run and equal on every machine."""
        source, row = self.locate(sample)
        return f"{self.sources[source].name or source}:{row}:{self.selections[source].table.id(row)}"

    def record(self, sample: int) -> Conversation:
        """The conversation of a sample, with its source's prompt; raises ``RuntimeError`` if the data file has changed
        since the index was opened."""
        source, row = self.locate(sample)
        return self.sources[source].prompt.apply(self.selections[source].table.read(row))

    def distrusted(self, sample: int, reason: str) -> RuntimeError:
        """See :meth:`vtprune_train.data.table.Table.distrusted`."""
        return self.selections[self.locate(sample)[0]].table.distrusted(reason)

    def files(self, sample: int, record: Conversation) -> list[VisualFile]:
        """The images and videos of a sample, in the order of their placeholders."""
        source = self.sources[self.locate(sample)[0]]
        return record.files(source.images, source.videos or source.images)

    def visuals(self, sample: int, files: Sequence[VisualFile], layout: ImageLayout, max_pixels: int) -> list[Visual]:
        """The indexed size of each image of a sample, and the sampled frames of each video.

        Args:
            files: see :meth:`files`.
            layout, max_pixels: see :meth:`vtprune_train.data.visuals.VisualFile.visual`.

        Raises:
            UnreadableImage: a video cannot be read.
            ChangedImage: a video differs from the index.
        """
        source, row = self.locate(sample)
        table = self.selections[source].table
        spans = table.spans(row)
        values = [table.column(name)[spans].tolist() for name in ("height", "width", "tokens", "frames")]
        if len(files) != len(values[0]):
            name = f"sample {self.sample_id(sample)}"
            raise self.distrusted(
                sample, f"{name} has {len(files)} images and videos, but {len(values[0])} in the index"
            )
        visuals: list[Visual] = []
        for file, height, width, tokens, steps in zip(files, *values, strict=True):
            if not file.is_video:
                visuals.append((height, width))
                continue
            try:
                visuals.append(file.visual(layout, max_pixels))
            except UNREADABLE:
                raise
            except ValueError as error:
                raise ChangedVideo(file.name, f"{error}; it could be used when the data was indexed") from error
            file.check(visuals[-1], height, width, tokens, steps, layout)
        return visuals

    def _check_files(self) -> None:
        """Check from time to time that no file of the index was changed since it was opened."""
        start = time.monotonic()
        if start < self._next_check:
            return
        for selection in self.selections:
            selection.check()
        end = time.monotonic()
        self._next_check = end + self.PAUSE * (end - start)

    def lengths(self, samples: Sequence[int] | np.ndarray) -> Lengths:
        """The lengths of ``samples``; reads only their entries."""
        self._check_files()
        samples = np.asarray(samples, dtype=np.int64)
        source = np.searchsorted(self._starts, samples, side="right") - 1
        text, supervised, first, num = (np.zeros(len(samples), dtype=np.int64) for _ in range(4))
        for number in np.unique(source).tolist():
            of_source = source == number
            table = self.selections[number].table
            rows = self.selections[number].rows[samples[of_source] - self._starts[number]]
            starts = table.column("span_starts")
            first[of_source], num[of_source] = starts[rows], starts[rows + 1] - starts[rows]
            text[of_source], supervised[of_source] = table.column("text")[rows], table.column("supervised")[rows]
        span_sample = np.repeat(np.arange(len(samples)), num)
        place = np.arange(len(span_sample)) - np.repeat(np.cumsum(num) - num - first, num)
        tokens, tiles, frames = (np.zeros_like(place) for _ in range(3))
        for number in np.unique(source).tolist():
            of_source = source[span_sample] == number
            table, places = self.selections[number].table, place[of_source]
            tokens[of_source], tiles[of_source] = table.column("tokens")[places], table.column("tiles")[places]
            frames[of_source] = table.column("frames")[places]
        return Lengths(text, supervised, tokens, tiles, frames, span_sample)


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
    """Build or open the index of all sources. On each machine one rank builds it while the others wait.

    Raises:
        ValueError: a file cannot be read; too many records cannot be used (more than ``max_bad``, more than the share
            ``max_bad_share`` of a source, or all of a source); a sample exceeds ``max_length`` or ``bounds`` and
            ``too_long`` is ``error``; or a sample has no supervised token and ``unsupervised`` is ``error``. The
            message names the first such samples.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    selections = []
    with locked(cache_dir / "index.lock"):
        for number, source in enumerate(sources):
            settings = (
                source.images,
                source.prompt,
                source.ignore,
                max_image_pixels,
                bounds,
                source.reader,
                source.videos,
            )
            measure = Measure(encoder, layout, *settings)
            # The name depends on the settings, not on the content of the files, so a changed file replaces its table.
            content = json.dumps([VERSION, str(source.path.resolve()), measure.fingerprint()], sort_keys=True)
            folder = cache_dir / f"index-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
            table = open_table(folder, find_files(source.path, source.reader), measure, workers)
            selections.append(select(table, take=source.take, seed=seed + number, max_length=max_length))
    _report_unsupervised(selections, unsupervised)
    _report_large(sources, selections, too_long)
    _report(sources, selections, max_bad, max_bad_share, max_length, too_long)
    return SampleIndex(list(sources), selections, seed)


def _report(
    sources: Sequence[Source],
    selections: Sequence[Selection],
    max_bad: int,
    max_bad_share: float,
    max_length: int,
    too_long: str,
) -> None:
    """Log records that are left out and fields that are not read; raise if too many records are left out."""
    for source, selection in zip(sources, selections, strict=True):
        table = selection.table
        if table.manifest["duplicates"]:
            row = table.manifest["duplicate_rows"][0]
            log.warning(
                "%s: %d record(s) have the id of an earlier record (first: %s); all of them are used",
                source.path, table.manifest["duplicates"], table.id(row),
            )  # fmt: skip
        if unread := table.manifest["unread"]:
            log.warning("%s: fields that are not read: %s", source.path, list_fields(unread))
        limit = source.take.partition(":")[2]
        if limit and int(limit) > len(table):
            log.warning(
                "%s: take=%s exceeds its %d record(s); all of them are taken", source.path, source.take, len(table)
            )
    num_bad = _total(selections, "bad")
    if num_bad > max_bad:
        raise ValueError(
            f"{num_bad} records cannot be used, more than data.max_bad={max_bad}; correct them or raise it. "
            f"First: {'; '.join(_first_bad(selections, NAMED_BAD))}"
        )
    for source, selection in zip(sources, selections, strict=True):
        _check_bad(source, selection, max_bad_share)
    if num_bad:
        for line in _first_bad(selections, num_bad):
            log.warning("left out: %s", line)
        log.warning("%d record(s) cannot be used and are left out (data.max_bad=%d)", num_bad, max_bad)
    if num_long := _total(selections, "too_long"):
        first = [(s.table.id(row), n) for s in selections for row, n in s.manifest["first_too_long"]]
        names = ", ".join(f"{name} ({n})" for name, n in first[:NAMED])
        if too_long == "error":
            raise ValueError(
                f"{num_long} sample(s) are longer than data.max_length={max_length} tokens (visual tokens counted "
                f"before dropping; samples are never truncated). Raise it or set data.too_long=skip. First: {names}"
            )
        log.warning("%d sample(s) longer than data.max_length=%d are skipped. First: %s", num_long, max_length, names)
    for source, selection in zip(sources, selections, strict=True):
        if not len(selection):
            raise ValueError(f"data file {source.path} has no usable record; remove the entry")


def _total(selections: Sequence[Selection], reason: str) -> int:
    return sum(selection.manifest[reason] for selection in selections)


def most_bad(share: float, records: int) -> int:
    """The number of bad records that ``data.max_bad_share`` allows, at least one."""
    return max(1, floor_of(share, records))


def _check_bad(source: Source, selection: Selection, share: float) -> None:
    """Raise if too many records of a source, or all, cannot be used; the message has the first ones with reasons."""
    counts = selection.manifest
    bad, taken = counts["bad"], sum(counts[key] for key in ("samples", "bad", "too_long", "too_large", "unsupervised"))
    if not bad or (bad < taken and bad <= most_bad(share, taken)):
        return
    what = f"none of its {taken} records can be used; correct them"
    if bad < taken:
        what = f"{bad} of its {taken} records cannot be used, more than data.max_bad_share={share:g}; correct them or "
        what += "raise it"
    raise ValueError(
        f"data file {source.path} (images in {source.images}): {what}. "
        f"First: {'; '.join(_first_bad([selection], NAMED_BAD))}"
    )


def list_fields(unread: Mapping[str, int]) -> str:
    """Names of fields with the number of records that have them, for a message."""
    return ", ".join(f"{name!r} ({count})" for name, count in unread.items())


def _report_unsupervised(selections: Sequence[Selection], policy: str) -> None:
    """Log the samples without supervised tokens, or raise."""
    if count := _total(selections, "unsupervised"):
        first = [s.table.id(row) for s in selections for row in s.manifest["first_unsupervised"]]
        names = ", ".join(first[:NAMED])
        if policy == "error":
            raise ValueError(
                f"{count} sample(s) have no supervised token, because their conversations have no answer. Correct them "
                f"or set data.unsupervised=skip. First: {names}"
            )
        log.warning("%d sample(s) without a supervised token are skipped. First: %s", count, names)


def _report_large(sources: Sequence[Source], selections: Sequence[Selection], policy: str) -> None:
    """Log the records that are too large to read or tokenize, or raise."""
    if count := _total(selections, "too_large"):
        reasons = "; ".join(
            f"{source.path}: {line}"
            for source, selection in zip(sources, selections, strict=True)
            for line in _errors(selection, selection.manifest["first_too_large"])
        )
        if policy == "error":
            raise ValueError(f"{count} record(s) are too large. {HOW_TO_FIX}. First: {reasons}")
        log.warning("%d record(s) are too large and are skipped (data.too_long=skip). First: %s", count, reasons)


def _first_bad(selections: Sequence[Selection], count: int) -> list[str]:
    """``id: error`` of the first ``count`` records that cannot be used."""
    lines: list[str] = []
    for selection in selections:
        lines += _errors(selection, np.fromfile(selection.folder / "bad.bin", np.int64, count - len(lines)).tolist())
    return lines


def _errors(selection: Selection, rows: Sequence[int]) -> list[str]:
    """``id: error`` of the records in ``rows``."""
    if not rows:
        return []
    table, row_set = selection.table, set(rows)
    entries = (entry for entry in table.errors() if entry["row"] in row_set)
    return [f"{table.id(entry['row'])}: {entry['error']}" for entry in islice(entries, len(row_set))]
