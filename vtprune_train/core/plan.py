"""Planner: computes every stage of a packed batch on the host, from lengths only.

All tensor shapes of the forward pass are therefore known before it starts; only which visual tokens are kept is decided
on the device.

Shape suffixes: T tokens in the stream, S segments, V visual tokens before a boundary, K visual tokens kept by it,
Q query rows, R supervised rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtprune_train.core.stream import (
    Boundary,
    Drop,
    ImageSpan,
    Outline,
    ScoredSegment,
    SegmentLayout,
    SpanLayout,
    Stage,
    StreamPlan,
)


def counts_per_stage(
    drops: Sequence[Drop],
    lengths: Sequence[int] | np.ndarray,
    measured: Sequence[np.ndarray] = (),
    spans: Sequence[ImageSpan] = (),
) -> list[np.ndarray]:
    """Token count of each span in every stage: a list of len(drops) + 1 arrays [spans] int64.

    Args:
        drops: in the order in which they act.
        lengths: [spans] token counts before the first drop.
        measured: actual counts after the first drops, if already known.
        spans: the spans, if known. Without them, drops that treat videos differently count every span as a long video.
    """
    counts = [np.asarray(lengths, dtype=np.int64)]
    at_first_drop: dict[int, np.ndarray] = {}  # of each method
    for index, drop in enumerate(drops):
        before = counts[-1]
        original = at_first_drop.setdefault(drop.owner, before)
        if index < len(measured):
            counts.append(np.asarray(measured[index], dtype=np.int64))
            continue
        kept = _kept(drop, original, before, spans)
        counts.append(kept if drop.adds or drop.returns else np.minimum(kept, before))
    return counts


def _kept(drop: Drop, original: np.ndarray, before: np.ndarray, spans: Sequence[ImageSpan]) -> np.ndarray:
    """[spans] int64, token count of each span after a drop."""
    pairs = np.stack([original, before])
    if spans and type(drop).kept_of is not Drop.kept_of:
        counts: dict[Any, int] = {}
        keys = [
            (span.grids, span.frames, span.tile_tokens, span.length, *pair)
            for span, pair in zip(spans, pairs.T.tolist(), strict=True)
        ]
        for span, key in zip(spans, keys, strict=True):
            if key not in counts:
                counts[key] = drop.kept_of(span, *key[4:])
        return np.array([counts[key] for key in keys], dtype=np.int64)
    different, place = np.unique(pairs, axis=1, return_inverse=True)
    kept = np.array([drop.kept(length, now) for length, now in different.T.tolist()], dtype=np.int64)
    return kept[place.ravel()]


def plan_stream(
    segments: Sequence[SegmentLayout],
    drops: Sequence[Drop],
    num_layers: int,
    *,
    key_layers: Sequence[int] = (),
    method: Any = None,
    measured: Sequence[np.ndarray] = (),
) -> StreamPlan:
    """Plan every stage of a packed batch from lengths only.

    Args:
        segments: the samples, in stream order; at least one.
        drops: in ascending order of their layers, each in ``[0, num_layers)``; empty for a dense pass.
        num_layers: decoder layers.
        key_layers: layers in which the method drops keys.
        method: the method that defines the drops; ``None`` for a dense pass.
        measured: [spans] actual token counts after the first drops, if a pass has already determined them.

    Raises:
        ValueError: no segments, a span or query row outside its segment, a segment with no remaining tokens, or a
            method that compares frames in a pass that divides videos into frames.
    """
    if not segments:
        raise ValueError("plan_stream needs at least one segment; pass a blank one for an empty micro-batch")
    if key_layers:
        _check_whole_videos(segments, drops, method)
    segments = divided(segments, getattr(method, "per", "video"), bool(key_layers))
    layout = _StreamLayout.of(segments, bool(drops))
    spans = [span for segment in segments for span in segment.spans]
    kept = counts_per_stage(drops, layout.lengths, measured, spans)
    places = [_Places(layout.starts, layout.lengths, counts) for counts in kept]
    edges = [0, *(drop.layer for drop in drops), num_layers]
    stages = tuple(
        _stage(place.of(layout.cu_seqlens), first, end)
        for place, first, end in zip(places, edges[:-1], edges[1:], strict=True)
    )
    if any(0 in stage.segment_lengths for stage in stages[1:]):
        raise _nothing_left()
    at_first_drop: dict[int, np.ndarray] = {}
    boundaries = tuple(
        _boundary(layout, before, after, drop, at_first_drop.setdefault(drop.owner, before.kept))
        for before, after, drop in zip(places[:-1], places[1:], drops, strict=True)
    )
    key_layouts = tuple(
        _boundary(layout, place, place, Drop(stage.first_layer, 1.0), place.kept)
        if any(stage.first_layer <= layer < stage.end_layer for layer in key_layers)
        else None
        for stage, place in zip(stages, places, strict=True)
    )
    return StreamPlan(
        stages,
        boundaries,
        torch.from_numpy(_rows_before(layout, places[-1], layout.supervised)),
        key_layouts,
        Outline(segments, drops, num_layers, key_layers, method),
    )


def divided(segments: Sequence[SegmentLayout], per: str, chooses_keys: bool) -> Sequence[SegmentLayout]:
    """Divide videos into the spans that a method's keep ratios apply to: with ``per`` = ``frame``, their steps in time.
    For methods that remove keys from the cache, videos with text between the frames are always divided, because the
    rows of this text must be known."""
    if not any(span.frames for segment in segments for span in segment.spans):
        return segments

    def spans(segment: SegmentLayout) -> tuple[ImageSpan, ...]:
        whole = [per == "video" and not (chooses_keys and span.runs) for span in segment.spans]
        parts = ((span,) if kept else span.steps() for span, kept in zip(segment.spans, whole, strict=True))
        return tuple(chain.from_iterable(parts))

    return [dataclasses.replace(segment, spans=spans(segment)) for segment in segments]


def _check_whole_videos(segments: Sequence[SegmentLayout], drops: Sequence[Drop], method: Any) -> None:
    """Raise a ``ValueError`` if a method for videos would see single frames, because another one removes keys."""
    comparing = [drop for drop in drops if drop.compares_frames]
    if not comparing or method.per == "frame":
        return
    if any(span.runs and span.frames > 1 for segment in segments for span in segment.spans):
        raise ValueError(
            f"{method.parts[comparing[0].owner].name} compares the frames of a video, but a method that removes keys "
            "from the key-value cache needs videos with text between the frames (Qwen3-VL, Qwen3.5) divided into "
            "frames: remove one of the two methods"
        )


def fronts_of(segments: Sequence[SegmentLayout], layout: Boundary) -> list[int | None]:
    """Number of tokens of each segment before its first image with remaining tokens at a stage; ``None`` if there is no
    such image."""
    fronts: list[int | None] = []
    laid_out = iter(layout.spans)
    for segment in segments:
        counts = [next(laid_out).before for _ in segment.spans]
        first = next((number for number, count in enumerate(counts) if count), None)
        fronts.append(
            None if first is None else segment.spans[first].start - sum(s.length for s in segment.spans[:first])
        )
    return fronts


def plan_pass(segments: Sequence[SegmentLayout], num_layers: int, method: Any) -> StreamPlan:
    """Plan the stages of a pass with ``method``, or of a dense pass if it is ``None``."""
    return plan_stream(segments, (), num_layers) if method is None else method.plan(segments, num_layers)


def replan(plan: StreamPlan, measured: Sequence[np.ndarray]) -> StreamPlan:
    """Recompute ``plan`` on the host after its first drops, given the actual token counts ``measured``: one [spans]
    int64 array per drop done so far."""
    outline = plan.outline
    return plan_stream(
        outline.segments,
        outline.drops,
        outline.num_layers,
        key_layers=outline.key_layers,
        method=outline.method,
        measured=measured,
    )


class _Places:
    """Row indices of the packed tokens at a stage in which ``kept[i]`` tokens of span i remain."""

    def __init__(self, starts: np.ndarray, lengths: np.ndarray, kept: np.ndarray):
        self.starts = starts
        self.kept = kept
        self.removed = np.concatenate([[0], np.cumsum(lengths - kept)])

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Map original rows to rows of this stage. The rows must not lie inside a span, except for its first row."""
        return rows - self.removed[np.searchsorted(self.starts, rows, side="left")]

    def spans(self) -> list[np.ndarray]:
        """The rows of each span's remaining tokens, as if they were adjacent."""
        return [np.arange(start, start + n) for start, n in zip(self.of(self.starts), self.kept, strict=True)]


@dataclass
class _StreamLayout:
    """Converts the segments' offsets to rows of the packed batch."""

    cu_seqlens: np.ndarray  # [S + 1]
    starts: np.ndarray  # [spans]
    lengths: np.ndarray  # [spans]
    visual: list[np.ndarray]  # the rows of each span
    interleaved: bool  # whether text stands between the tokens of a span
    text: np.ndarray  # [T - V]
    after_query: np.ndarray  # [Q], the row after each query row; never inside a span, so stages can track its index
    query_segment: np.ndarray  # [Q]
    span_segment: np.ndarray  # [spans]
    supervised: np.ndarray  # [R]
    segments: Sequence[SegmentLayout]

    @classmethod
    def of(cls, segments: Sequence[SegmentLayout], drops: bool) -> _StreamLayout:
        cu_seqlens = np.concatenate([[0], np.cumsum([s.length for s in segments])]).astype(np.int64)
        starts, lengths, span_segment, after_query, query_segment, supervised = [], [], [], [], [], []
        visual: list[np.ndarray] = []
        for index, (segment, base) in enumerate(zip(segments, cu_seqlens[:-1].tolist(), strict=True)):
            _check_segment(segment, drops)
            starts += [base + span.start for span in segment.spans]
            lengths += [span.length for span in segment.spans]
            visual += [base + span.offsets() for span in segment.spans]
            span_segment += [index] * len(segment.spans)
            after_query += [base + offset + 1 for offset in segment.query_offsets]
            query_segment += [index] * len(segment.query_offsets)
            supervised += [base + offset for offset in segment.supervised_offsets]
        is_text = np.ones(int(cu_seqlens[-1]), dtype=bool)
        for of_span in visual:
            is_text[of_span] = False

        def rows(values: list[int]) -> np.ndarray:
            return np.array(values, dtype=np.int64)

        return cls(
            cu_seqlens=cu_seqlens,
            starts=rows(starts),
            lengths=rows(lengths),
            visual=visual,
            interleaved=any(span.runs for segment in segments for span in segment.spans),
            text=np.flatnonzero(is_text),
            after_query=rows(after_query),
            query_segment=rows(query_segment),
            span_segment=rows(span_segment),
            supervised=rows(supervised),
            segments=segments,
        )

    def rows_that_rank(self, drop: Drop) -> tuple[np.ndarray, np.ndarray]:
        """[Q] the row after each query row, and the segment it belongs to."""
        if drop.queries == "answer":
            return self.after_query, self.query_segment
        rows, owners = [], []
        for index, segment in enumerate(self.segments):
            if segment.spans:
                rows_of_segment = _instruction(segment) + self.cu_seqlens[index] + 1
                rows.append(rows_of_segment)
                owners.append(np.full(len(rows_of_segment), index))
        return _joined(rows), _joined(owners)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def _instruction(segment: SegmentLayout) -> np.ndarray:
    """Offsets of the text from the last image to the first query row after it. If there is no such text, the segment's
    last query row, i.e. the last image's last token when the answer follows immediately."""
    last = segment.spans[-1].end
    behind = [offset for offset in segment.query_offsets if offset >= last]
    return np.arange(last, min(behind) + 1) if behind else np.array([max(segment.query_offsets)])


def instruction_rows(segment: SegmentLayout) -> np.ndarray:
    """Offsets of the text from the last image to the first query row after it; empty if there is no such text."""
    rows = _instruction(segment)
    return rows[rows >= segment.spans[-1].end]


def _check_segment(segment: SegmentLayout, drops: bool) -> None:
    """Raise a ``ValueError`` if a span or row lies where it cannot be; ``drops``: whether tokens are dropped."""
    end = 0
    for span in segment.spans:
        if span.start < end or span.length < 0 or span.end > segment.length or not _runs_fit(span):
            raise ValueError(
                f"image span {span} overlaps another span, ends after its segment of {segment.length} tokens, or has "
                "runs that do not add up to its length"
            )
        end = span.end
    _check_rows(segment, drops)
    if segment.spans and not segment.query_offsets:
        raise ValueError("a segment with images needs at least one query row to rank their tokens")


def _check_rows(segment: SegmentLayout, drops: bool) -> None:
    """The part of :func:`_check_segment` about query rows and supervised tokens."""
    queries = np.array(segment.query_offsets, dtype=np.int64)
    supervised = np.array(segment.supervised_offsets, dtype=np.int64)
    end_of_query, is_between_query = _enclosing(segment.spans, queries)
    end_of_target, is_between_target = _enclosing(segment.spans, supervised)
    between = np.concatenate([queries[is_between_query], supervised[is_between_target]])
    if drops and len(between):
        raise ValueError(
            f"the text between the frames of a video (token {between.min()} of the sample) has labels or ends a "
            "prompt; set its labels to -100, or drop tokens per frame (per: frame)"
        )
    if len(outside := queries[(queries < 0) | (queries >= segment.length)]):
        raise ValueError(f"query row {outside[0]} lies outside its segment of {segment.length} tokens")
    if len(inside := queries[(queries < end_of_query - 1) & ~is_between_query]):
        raise ValueError(
            f"query row {inside[0]} is inside an image; only the last token of an image can be a query row"
        )
    is_wrong = (supervised < 1) | (supervised >= segment.length) | ((end_of_target > 0) & ~is_between_target)
    if len(wrong := supervised[is_wrong]):
        raise ValueError(
            f"supervised token {wrong[0]} must not be the first of its segment, outside it, or inside an image"
        )


def _enclosing(spans: Sequence[ImageSpan], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row: the end of the span around it, 0 if there is none; and whether it is text between two runs of that
    span."""
    if not spans or not len(rows):
        return np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=bool)
    starts, ends = np.array([(span.start, span.end) for span in spans]).T
    runs = [run for span in spans for run in span.runs or ((span.start, span.length),)]
    run_starts, run_lengths = np.array(runs).T
    index = np.searchsorted(starts, rows, side="right") - 1
    end = np.where((index >= 0) & (rows < ends[index]), ends[index], 0)
    run = np.searchsorted(run_starts, rows, side="right") - 1
    return end, (end > 0) & (rows >= run_starts[run] + run_lengths[run])


def _runs_fit(span: ImageSpan) -> bool:
    """Whether the runs of a span are in order and add up to its length."""
    if not span.runs:
        return True
    ends = [start + length for start, length in span.runs]
    in_order = all(start >= end for (start, _), end in zip(span.runs[1:], ends, strict=False))
    return in_order and span.runs[0][0] == span.start and sum(length for _, length in span.runs) == span.length


def _rows_before(layout: _StreamLayout, places: _Places, rows: np.ndarray) -> np.ndarray:
    """The row just before each of ``rows`` at a stage, in the same segment."""
    before = places.of(rows) - 1
    segment = np.searchsorted(layout.cu_seqlens, rows - 1, side="right") - 1
    if (before < places.of(layout.cu_seqlens)[segment]).any():
        raise _nothing_left()
    return before


def _nothing_left() -> ValueError:
    return ValueError(
        "an image at the start of a sample keeps no token at this keep ratio, so no row is left to predict the next "
        "token from; raise the keep ratio, or begin the template with a token"
    )


def _stage(cu_seqlens: np.ndarray, first_layer: int, end_layer: int) -> Stage:
    lengths = np.diff(cu_seqlens)
    positions = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
    return Stage(
        first_layer=first_layer,
        end_layer=end_layer,
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        position_ids=torch.from_numpy(positions),
        segment_lengths=tuple(lengths.tolist()),
    )


def _boundary(layout: _StreamLayout, before: _Places, after: _Places, drop: Drop, original: np.ndarray) -> Boundary:
    is_first = bool((before.kept == layout.lengths).all())
    span_rows = layout.visual if is_first else before.spans()
    cu_seqlens = before.of(layout.cu_seqlens)
    after_query, query_segment = layout.rows_that_rank(drop)
    query_rows = _rows_before(layout, before, after_query)
    scored: list[ScoredSegment] = []
    scored_queries: list[np.ndarray] = []
    offset_in_scored: dict[int, int] = {}
    length_so_far = 0
    for index in np.unique(layout.span_segment).tolist():
        segment_rows = query_rows[query_segment == index]
        start, end = int(cu_seqlens[index]), int(cu_seqlens[index + 1])
        taken = sum(len(rows) for rows in scored_queries)
        question = layout.segments[index].question
        scored.append(ScoredSegment(start, end, taken, taken + len(segment_rows), question))
        scored_queries.append(segment_rows)
        offset_in_scored[index] = length_so_far - start
        length_so_far += end - start
    sizes = original if drop.returns else before.kept
    sorted_starts = np.cumsum([0, *sizes])[:-1]
    shifts = [offset_in_scored[index] for index in layout.span_segment.tolist()]
    per_token = np.repeat(np.array(shifts, dtype=np.int64), [len(rows) for rows in span_rows])
    text_rows, next_visual_rows = before.of(layout.text), _joined(after.spans())
    next_order = np.zeros(int(after.of(layout.cu_seqlens)[-1]), dtype=np.int64)
    if not layout.interleaved:
        next_order[after.of(layout.text)] = np.arange(len(text_rows))
        next_order[next_visual_rows] = len(text_rows) + np.arange(len(next_visual_rows))
    uniform = _uniform_scores(layout, after.kept, sizes.tolist()) if drop.uniform_without_text else None
    return Boundary(
        layer=drop.layer,
        text_rows=torch.from_numpy(text_rows),
        visual_rows=torch.from_numpy(_joined(span_rows)),
        span_of_visual=torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)),
        take=torch.from_numpy(
            _joined([np.arange(s, s + min(k, n)) for s, k, n in zip(sorted_starts, after.kept, sizes, strict=True)])
        ),
        query_rows=torch.from_numpy(_joined(scored_queries)),
        segments=tuple(scored),
        visual_in_scored=torch.from_numpy(_joined(span_rows) + per_token),
        next_order=torch.from_numpy(next_order),
        next_visual_rows=torch.from_numpy(next_visual_rows),
        spans=_span_layouts(layout, before.kept, after.kept, original),
        drop=drop,
        uniform=uniform,
        scored_shift=torch.from_numpy(per_token) if layout.interleaved else None,
    )


def _span_layouts(
    layout: _StreamLayout, before: np.ndarray, after: np.ndarray, original: np.ndarray
) -> tuple[SpanLayout, ...]:
    spans: list[SpanLayout] = []
    for index, segment in enumerate(layout.segments):
        for number, span in enumerate(segment.spans):
            i = len(spans)
            counts = int(original[i]), int(before[i]), int(after[i])
            tile_tokens = span.tile_tokens if counts[1] == span.length else ()
            spans.append(SpanLayout(index, number, *counts, span.grids, segment.key, span.frames, tile_tokens))
    return tuple(spans)


def _uniform_scores(layout: _StreamLayout, kept: np.ndarray, sizes: list[int]) -> Tensor | None:
    """Scores for spans whose query row is a visual token: 1 on an evenly spaced grid of the kept count, 0 elsewhere."""
    last_visual = {int(rows[-1]) for rows in layout.visual if len(rows)}
    by_visual = {
        segment
        for segment, after in zip(layout.query_segment.tolist(), layout.after_query.tolist(), strict=True)
        if after - 1 in last_visual
    }
    parts = []
    for segment, size, keep in zip(layout.span_segment.tolist(), sizes, kept.tolist(), strict=True):
        scores = np.full(size, np.nan, dtype=np.float32)
        if segment in by_visual:
            scores[:] = 0.0
            scores[(2 * np.arange(keep) + 1) * size // (2 * max(keep, 1))] = 1.0
        parts.append(scores)
    return torch.from_numpy(np.concatenate(parts)) if by_visual else None
