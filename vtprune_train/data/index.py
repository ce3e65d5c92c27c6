"""The sample index: every sample's lengths and image sizes, found once, in parallel, and cached.

Reading, memory-mapping, parallel mapping and caching are the work of ``datasets``; the cache's key is the content that
would change the lengths (file, template, tokenizer, tiling).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from datasets import Dataset, Features, List, Value
from filelock import FileLock

from vtprune_train.data.chat import UNSUPERVISED, ChatEncoder
from vtprune_train.data.images import UNREADABLE, image_size
from vtprune_train.data.records import FEATURES, read_source, turns_of
from vtprune_train.models.layouts import ImageLayout

log = logging.getLogger(__name__)

INDEX_VERSION = 1
INDEX_FEATURES = Features(
    {
        **FEATURES,
        "num_text": Value("int32"),
        "num_supervised": Value("int32"),
        "image_heights": List(Value("int32")),
        "image_widths": List(Value("int32")),
        "image_tokens": List(Value("int32")),
        "image_tiles": List(Value("int32")),
    }
)
SHOWN = 5
IMAGE_ERROR = "image "


@dataclass(frozen=True)
class Source:
    """One data file and its folder of images; ``take`` is ``all``, ``first:N`` or ``random:N``."""

    path: Path
    images: Path
    take: str = "all"


@dataclass
class SampleIndex:
    """The usable samples, as arrays, and where to find their rows.

    ``tokens`` [samples] before dropping, ``text``, ``supervised`` [samples]; ``span_tokens``, ``span_tiles`` and
    ``span_sample`` [images]; ``source`` and ``row`` [samples] locate the record, ``ids`` [samples] are its own
    names; ``bad`` counts samples left out.
    """

    sources: list[Source]
    rows: list[Dataset]
    source: np.ndarray
    row: np.ndarray
    text: np.ndarray
    supervised: np.ndarray
    span_tokens: np.ndarray
    span_tiles: np.ndarray
    span_sample: np.ndarray
    ids: np.ndarray
    bad: int = 0
    too_long: int = 0

    def __len__(self) -> int:
        return len(self.row)

    @property
    def tokens(self) -> np.ndarray:
        """[samples] tokens of each sample before dropping."""
        visual = np.bincount(self.span_sample, weights=self.span_tokens, minlength=len(self))
        return self.text + visual.astype(np.int64)

    @property
    def tiles(self) -> np.ndarray:
        """[samples] tiles (or patches) that the tower sees."""
        return np.bincount(self.span_sample, weights=self.span_tiles, minlength=len(self)).astype(np.int64)

    def identity(self) -> str:
        """Number and hash of all sample ids, in order: equal for equal sets of samples."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(f"{self.sample_id(index)}\n".encode())
        return f"{len(self)}:{digest.hexdigest()[:16]}"

    def sample_id(self, index: int) -> str:
        """``source:row:id``, unique within the run and the same on every machine."""
        return f"{self.source[index]}:{self.row[index]}:{self.ids[index]}"


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
) -> SampleIndex:
    """Index all sources. Ranks of one machine wait for the first to build; the others read its cache.

    Raises:
        ValueError: a file cannot be read, more than ``max_bad`` records are unusable, a sample is longer than
            ``max_length`` and ``too_long`` is ``error``, or has nothing to learn and ``unsupervised`` is ``error``;
            names the first such ids.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(str(cache_dir / "index.lock")):
        tables = [_index_source(source, encoder, layout, workers, cache_dir) for source in sources]
    parts: list[dict[str, np.ndarray]] = []
    bad: list[str] = []
    long: list[str] = []
    silent: list[str] = []
    for number, (source, table) in enumerate(zip(sources, tables, strict=True)):
        chosen = _take(source, len(table), seed + number)
        columns = table.with_format("numpy")
        errors = np.array(table["error"][:], dtype=object)[chosen] if len(table) else np.zeros(0, dtype=object)
        visual = np.array([int(sum(t)) for t in table["image_tokens"]], dtype=np.int64)
        lengths = (np.asarray(columns["num_text"][:], dtype=np.int64) + visual)[chosen]
        is_silent = errors == UNSUPERVISED
        is_bad, is_long = (errors != "") & ~is_silent, lengths > max_length
        bad += [f"{table[int(i)]['id']}: {e}" for i, e in zip(chosen[is_bad], errors[is_bad], strict=True)]
        silent += [table[int(i)]["id"] for i in chosen[is_silent]]
        long += [f"{table[int(i)]['id']} ({n})" for i, n in zip(chosen[is_long], lengths[is_long], strict=True)]
        keep = chosen[~is_bad & ~is_silent & ~is_long]
        parts.append(_arrays(table, keep, number))
    _report(bad, long, max_bad, max_length, too_long)
    _report_unsupervised(silent, unsupervised)
    offsets = np.cumsum([0, *(len(part["row"]) for part in parts)])
    for part, offset in zip(parts, offsets[:-1], strict=True):
        part["span_sample"] = part["span_sample"] + offset
    joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return SampleIndex(sources=list(sources), rows=tables, bad=len(bad), too_long=len(long), **joined)


def _arrays(table: Dataset, keep: np.ndarray, source: int) -> dict[str, np.ndarray]:
    chosen = table.select(keep)
    spans = [np.asarray(tokens, dtype=np.int64) for tokens in chosen["image_tokens"]]
    tiles = [np.asarray(count, dtype=np.int64) for count in chosen["image_tiles"]]
    return {
        "source": np.full(len(keep), source),
        "row": keep,
        "ids": np.array(chosen["id"][:], dtype=object),
        "text": np.array(chosen["num_text"][:], dtype=np.int64),
        "supervised": np.array(chosen["num_supervised"][:], dtype=np.int64),
        "span_tokens": np.concatenate([np.zeros(0, dtype=np.int64), *spans]),
        "span_tiles": np.concatenate([np.zeros(0, dtype=np.int64), *tiles]),
        "span_sample": np.repeat(np.arange(len(keep)), [len(tokens) for tokens in spans]),
    }


def _report(bad: list[str], long: list[str], max_bad: int, max_length: int, too_long: str) -> None:
    if bad:
        shown = "; ".join(bad[:SHOWN])
        if len(bad) > max_bad:
            raise ValueError(
                f"{len(bad)} records cannot be used, more than data.max_bad={max_bad}; mend them or raise it. "
                f"First: {shown}"
            )
        for line in bad:
            log.warning("left out: %s", line)
        log.warning("%d record(s) cannot be used and are left out (data.max_bad=%d)", len(bad), max_bad)
    if long:
        shown = ", ".join(long[: 2 * SHOWN])
        if too_long == "error":
            raise ValueError(
                f"{len(long)} sample(s) are longer than data.max_length={max_length} tokens (visual tokens counted "
                f"before dropping; samples are never cut). Raise it or set data.too_long=skip. First: {shown}"
            )
        log.warning("%d sample(s) longer than data.max_length=%d are skipped. First: %s", len(long), max_length, shown)


def _report_unsupervised(silent: list[str], policy: str) -> None:
    if not silent:
        return
    shown = ", ".join(silent[: 2 * SHOWN])
    if policy == "error":
        raise ValueError(
            f"{len(silent)} sample(s) have no supervised token: their conversations have no answer to learn from. Mend "
            f"them or set data.unsupervised=skip. First: {shown}"
        )
    log.warning("%d sample(s) without a supervised token are skipped. First: %s", len(silent), shown)


def _take(source: Source, count: int, seed: int) -> np.ndarray:
    kind, _, number = source.take.partition(":")
    if kind == "all":
        return np.arange(count)
    wanted = min(int(number), count)
    if kind == "first":
        return np.arange(wanted)
    return np.sort(np.random.default_rng(seed).permutation(count)[:wanted])


def _index_source(source: Source, encoder: ChatEncoder, layout: ImageLayout, workers: int, cache_dir: Path) -> Dataset:
    rows = read_source(source.path, str(cache_dir))
    content = f"{INDEX_VERSION}|{rows._fingerprint}|{source.images.resolve()}|{layout}|{encoder.fingerprint()}"
    fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
    workers = workers if len(rows) >= 1000 * workers else 1
    show = datasets.is_progress_bar_enabled()
    arguments: dict[str, Any] = {"encoder": encoder, "layout": layout, "images": source.images}

    def measure(**options: Any) -> Dataset:
        return rows.map(
            _measure,
            fn_kwargs=arguments,
            num_proc=workers if workers > 1 else None,
            features=INDEX_FEATURES,
            new_fingerprint=fingerprint,
            cache_file_name=str(cache_dir / f"index-{fingerprint}.arrow"),
            desc=f"index {source.path.name}" if show else None,
            **options,
        )

    table = measure()
    # The cache knows nothing of the pictures: look again at those that could not be read.
    doubtful = [row for row, error in enumerate(table["error"]) if error.startswith(IMAGE_ERROR)]
    if any(_measure(rows[row], **arguments)["error"] != table[row]["error"] for row in doubtful):
        return measure(load_from_cache_file=False)
    return table


def _measure(row: dict[str, Any], encoder: ChatEncoder, layout: ImageLayout, images: Path) -> dict[str, Any]:
    """Lengths of one row; what keeps it from being used goes to ``error``."""
    measured: dict[str, Any] = {
        "error": row["error"],
        "num_text": 0,
        "num_supervised": 0,
        "image_heights": [],
        "image_widths": [],
        "image_tokens": [],
        "image_tiles": [],
    }
    if row["error"]:
        return measured
    sizes = []
    for name in row["images"]:
        try:
            sizes.append(image_size(images / name))
        except UNREADABLE as error:
            return {**measured, "error": f"{IMAGE_ERROR}{images / name}: {error}"}
    try:
        chat = encoder.encode(turns_of(row))
        tokens, tiles = layout.tokens(sizes), layout.tiles(sizes)
    except ValueError as error:
        return {**measured, "error": str(error)}
    return {
        **measured,
        "num_text": len(chat.input_ids) - len(chat.image_offsets),
        "num_supervised": int((chat.labels >= 0).sum()),
        "image_heights": [height for height, _ in sizes],
        "image_widths": [width for _, width in sizes],
        "image_tokens": tokens,
        "image_tiles": tiles,
    }
