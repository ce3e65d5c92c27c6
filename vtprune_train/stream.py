"""The nouns everyone shares: the packed stream, its image spans, and the plan of every stage.

Everything here is laid out on the host from lengths alone, so that every shape of the forward pass is known before
it starts; only WHICH visual tokens survive a boundary is decided on the device.

Shape suffixes: T tokens in the stream, S segments, V visual tokens before a boundary, K visual tokens kept by it,
Q query rows, R supervised rows, P tiles.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

IMAGE = "<image>"  # an image's place in text, and its token
IGNORE = -100  # a label that is not supervised


@dataclass(frozen=True)
class ImageSpan:
    """One image's visual tokens within a segment: ``length`` tokens from offset ``start``.

    ``grids`` are the rasters ``(rows, columns)`` whose cells the tokens are, in order (LLaVA-NeXT: the base tile, then
    the unpadded tiles with their newline column); empty where the family does not say.
    """

    start: int
    length: int
    grids: tuple[tuple[int, int], ...] = ()

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class SegmentLayout:
    """What the host knows of one sample: offsets count from the segment's first token, before any dropping.

    Args:
        length: tokens, text and visual.
        spans: the sample's images, in order, not overlapping.
        query_offsets: tokens whose attention ranks the visual tokens.
        supervised_offsets: tokens that the loss asks for (the row before each one predicts it).
        key: a number made of the sample's text, for draws that must not depend on the batch.
    """

    length: int
    spans: tuple[ImageSpan, ...] = ()
    query_offsets: tuple[int, ...] = ()
    supervised_offsets: tuple[int, ...] = ()
    key: int = 0


def text_key(ids: np.ndarray) -> int:
    """A number made of a sample's text tokens (without its images), the same in every batch: see ``SegmentLayout``."""
    return zlib.crc32(np.ascontiguousarray(ids, dtype=np.int64).tobytes())


@dataclass(frozen=True)
class Drop:
    """Where and how much a method drops: before decoder layer ``layer`` (0: before the decoder), each span keeps
    ``floor(n * keep)``. A subclass may count otherwise by overriding :meth:`kept`.

    Args:
        layer: decoder layer, counted from 0, before which tokens change.
        keep: share of the span's ORIGINAL tokens (those that the method found at its first drop), so ratios of
            successive drops are cumulative. Of an adaptive drop: the share expected on average.
        adaptive: the method counts on the device; ``keep`` only serves plans made before.
        returns: all tokens that this method set aside since its first drop come back, with the states they had then.
        adds: more tokens leave than came in (learned ones), so positions are numbered anew.
        queries: the rows whose attention ranks: ``answer``, those that predict an answer's first token; or
            ``instruction``, the text between a segment's last image and the answer.
        uniform_without_text: spread the kept tokens evenly, instead of ranking them, in segments whose query row is
            itself a visual token (no instruction follows the image, as in projector alignment).
        ranked: whether the method's ranking is made for it; a method may only look at the tokens somewhere.
        owner: which of a combination's methods drops here.
    """

    layer: int
    keep: float
    adaptive: bool = False
    returns: bool = False
    adds: bool = False
    queries: Literal["answer", "instruction"] = "answer"
    uniform_without_text: bool = False
    ranked: bool = True
    owner: int = 0

    def kept(self, length: int, before: int) -> int:
        """Tokens of a span that enter the next stage (floor, as PyramidDrop's code counts).

        Args:
            length: the span's tokens at the method's first drop.
            before: its tokens in the stage that ends.
        """
        return length if self.returns else int(length * self.keep)


def counts_per_stage(
    drops: Sequence[Drop], lengths: Sequence[int] | np.ndarray, measured: Sequence[np.ndarray] = ()
) -> list[np.ndarray]:
    """Tokens of each span in every stage: one array [spans] int64 more than there are drops.

    Args:
        drops: in the order in which they act.
        lengths: [spans] tokens before the first.
        measured: what the first drops really left, where that is known already.
    """
    counts = [np.asarray(lengths, dtype=np.int64)]
    found: dict[int, np.ndarray] = {}
    for index, drop in enumerate(drops):
        before = counts[-1]
        original = found.setdefault(drop.owner, before)
        if index < len(measured):
            counts.append(np.asarray(measured[index], dtype=np.int64))
            continue
        pairs, place = np.unique(np.stack([original, before]), axis=1, return_inverse=True)
        kept = np.array([drop.kept(length, now) for length, now in pairs.T.tolist()], dtype=np.int64)
        kept = kept if drop.adds or drop.returns else np.minimum(kept, pairs[1])
        counts.append(kept[place.ravel()])
    return counts


@dataclass
class Stage:
    """A run of decoder layers ``[first_layer, end_layer)`` that see the same tokens; none before a boundary at layer 0.

    ``position_ids`` [T] int64 number each segment from 0 (the ``renumber`` choice); ``cu_seqlens`` [S + 1] int32.
    """

    first_layer: int
    end_layer: int
    cu_seqlens: Tensor
    position_ids: Tensor
    segment_lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.segment_lengths)

    @property
    def max_seqlen(self) -> int:
        return max(self.segment_lengths)


@dataclass(frozen=True)
class ScoredSegment:
    """A segment with images at a boundary: rows ``[start, end)`` of the stream, and which query rows are its own."""

    start: int
    end: int
    query_start: int
    query_end: int


@dataclass(frozen=True)
class SpanLayout:
    """One image's visual tokens at a boundary, in numbers that the host knows.

    Args:
        segment: which segment of the stream.
        number: which image of its segment, from 0.
        original: tokens at the method's first drop.
        before: tokens in the stage that ends.
        after: tokens that enter the next stage (of an adaptive drop: as expected).
        grids: see :class:`ImageSpan`.
        key: see :class:`SegmentLayout`.
    """

    segment: int
    number: int
    original: int
    before: int
    after: int
    grids: tuple[tuple[int, int], ...] = ()
    key: int = 0


@dataclass
class Boundary:
    """What the host knows of one drop. Rows count in the stream of the stage that ends here.

    V candidates are the visual tokens of that stage, or where tokens return, all that the method found at its first
    drop; they stand span after span.

    Args:
        layer: first layer of the stage that begins.
        text_rows: [T - V] int64, rows that always stay.
        visual_rows: [V] int64, rows of the stage's visual tokens, ascending.
        span_of_visual: [V] int64, which span each candidate belongs to, ascending.
        take: [K] int64, positions to take after sorting V by (span, descending score); of no use where K is not
            planned or exceeds V.
        query_rows: [Q] int64, the query rows of all scored segments, in order.
        segments: the segments that have images.
        visual_in_scored: [V] int64, where each visual token stands in the scored segments laid end to end.
        next_order: [T_next] int64, the next stage's rows among [text rows, chosen tokens].
        next_visual_rows: [K] int64, rows of the next stage that hold visual tokens.
        spans: all images of the stream, in order.
        drop: what happens here; its ``owner`` chooses.
        uniform: [V] float32, scores that spread the kept tokens evenly over the span; ``None`` where no segment
            wants that. NaN marks tokens that are ranked by the method.
    """

    layer: int
    text_rows: Tensor
    visual_rows: Tensor
    span_of_visual: Tensor
    take: Tensor
    query_rows: Tensor
    segments: tuple[ScoredSegment, ...]
    visual_in_scored: Tensor
    next_order: Tensor
    next_visual_rows: Tensor
    spans: tuple[SpanLayout, ...]
    drop: Drop
    uniform: Tensor | None = None


class Outline:
    """What a plan was made of, for planning the rest anew once an adaptive drop has counted; and ``method``, whose plan
    it is, with the settings of the step that it is for. Host only."""

    def __init__(
        self,
        segments: Sequence[SegmentLayout],
        drops: Sequence[Drop],
        num_layers: int,
        key_layers: Sequence[int],
        method: Any,
    ):
        self.segments, self.drops, self.num_layers, self.key_layers = segments, drops, num_layers, key_layers
        self.method = method


@dataclass
class StreamPlan:
    """The whole forward pass in lengths: ``stages[i]`` ends at ``boundaries[i]``, which begins ``stages[i + 1]``.

    ``predict_rows`` [R] int64 are the rows of the LAST stage whose next token is supervised. ``key_layouts`` describe
    the stages in whose layers keys are chosen, as a boundary that drops nothing; ``None`` for other stages.
    """

    stages: tuple[Stage, ...]
    boundaries: tuple[Boundary, ...]
    predict_rows: Tensor
    key_layouts: tuple[Boundary | None, ...]
    outline: Outline

    def with_counts(self, measured: Sequence[np.ndarray]) -> StreamPlan:
        """The plan (on the host) when the first drops left ``measured`` tokens of each span."""
        own = self.outline
        return plan_stream(
            own.segments,
            own.drops,
            own.num_layers,
            key_layers=own.key_layers,
            method=own.method,
            measured=measured,
        )


@dataclass
class TeacherPass:
    """A second pass over the same stream, without gradients, whose output the first is drawn to.

    Args:
        plan: its stages.
        weight: of the KL divergence in the loss.
        temperature: softens both outputs.
    """

    plan: StreamPlan
    weight: float
    temperature: float


@dataclass
class PackedBatch:
    """One micro-batch: samples end to end, without padding.

    Args:
        input_ids: [T] int64; rows of visual tokens hold the image token's id.
        visual_rows: [V] int64, the rows that projected image features fill.
        visual_index: [V] int64, which feature fills each: a row of [projected features of all tiles; image_newline],
            or of the features that the family itself makes of ``image_inputs``.
        pixel_values: [P, ...] float32, the tiles (or patches) of all images; a blank one where no sample has an image.
        plan: the stages.
        targets: [R] int64, the supervised tokens, in the order of ``plan.predict_rows``.
        answer_of_target: [R] int64, which answer of the batch each belongs to.
        num_answers: answers in the batch.
        sample_ids: the samples packed, in order (host only).
        targets_per_sample: how many of ``targets`` are each sample's (host only).
        unreadable: ``(sample id, reason)`` of samples left out because an image could not be read (host only).
        costs: numbers for the logs, known from lengths alone (host only).
        image_inputs: what ``get_image_features`` of the family takes beside the pixels: tensors go to the device,
            tuples of integers stay on the host; ``None`` where tiles are gathered.
        positions: [parts, T] int64, positions that stay with their tokens; ``None`` where segments count tokens.
        teacher: the pruned pass that a step on full tokens learns from; ``None`` elsewhere.
    """

    input_ids: Tensor
    visual_rows: Tensor
    visual_index: Tensor
    pixel_values: Tensor
    plan: StreamPlan
    targets: Tensor
    answer_of_target: Tensor
    num_answers: int
    sample_ids: tuple[str, ...] = ()
    targets_per_sample: tuple[int, ...] = ()
    unreadable: tuple[tuple[str, str], ...] = ()
    costs: dict[str, float] = field(default_factory=dict)
    image_inputs: dict[str, Any] | None = None
    positions: Tensor | None = None
    teacher: TeacherPass | None = None

    def to(self, device: torch.device | str) -> PackedBatch:
        """Copy every tensor to ``device`` (asynchronously from pinned memory)."""
        return map_leaves(self, Tensor, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """Copy every tensor to pinned memory."""
        return map_leaves(self, Tensor, Tensor.pin_memory)


def map_leaves(value: Any, kind: type, function: Any) -> Any:
    """``value`` with ``function`` applied to everything of type ``kind`` in nested dataclasses, tuples and dicts."""
    if isinstance(value, kind):
        return function(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {f.name: map_leaves(getattr(value, f.name), kind, function) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **changes)
    if isinstance(value, tuple):
        return tuple(map_leaves(item, kind, function) for item in value)
    if isinstance(value, dict):
        return {key: map_leaves(item, kind, function) for key, item in value.items()}
    return value


class _Places:
    """Where tokens of the packed stream stand at a stage, when ``kept[i]`` of span i's tokens remain."""

    def __init__(self, starts: np.ndarray, lengths: np.ndarray, kept: np.ndarray):
        self.starts = starts
        self.kept = kept
        self.removed = np.concatenate([[0], np.cumsum(lengths - kept)])

    def of(self, rows: np.ndarray) -> np.ndarray:
        """New rows of original rows; those must not lie inside a span (its first token's row is allowed)."""
        return rows - self.removed[np.searchsorted(self.starts, rows, side="left")]

    def spans(self) -> list[np.ndarray]:
        """The rows of each span's remaining tokens."""
        return [np.arange(start, start + n) for start, n in zip(self.of(self.starts), self.kept, strict=True)]


def plan_stream(
    segments: Sequence[SegmentLayout],
    drops: Sequence[Drop],
    num_layers: int,
    *,
    key_layers: Sequence[int] = (),
    method: Any = None,
    measured: Sequence[np.ndarray] = (),
) -> StreamPlan:
    """Lay out every stage of a packed stream from lengths alone.

    Args:
        segments: the samples, in stream order; at least one.
        drops: in ascending order of their layers, each in ``[0, num_layers)``; empty for a dense pass.
        num_layers: decoder layers.
        key_layers: layers in which a method leaves keys out.
        method: whose drops they are; ``None`` for a dense pass.
        measured: [spans] tokens that the first drops left, where a pass has found them out.

    Raises:
        ValueError: no segments, or a span or query row outside its segment.
    """
    if not segments:
        raise ValueError("plan_stream needs at least one segment; an empty micro-batch is padded with a blank one")
    layout = _StreamLayout.of(segments)
    kept = counts_per_stage(drops, layout.lengths, measured)
    places = [_Places(layout.starts, layout.lengths, counts) for counts in kept]
    edges = [0, *(drop.layer for drop in drops), num_layers]
    stages = tuple(
        _stage(place.of(layout.cu_seqlens), first, end)
        for place, first, end in zip(places, edges[:-1], edges[1:], strict=True)
    )
    found: dict[int, np.ndarray] = {}
    boundaries = tuple(
        _boundary(layout, before, after, drop, found.setdefault(drop.owner, before.kept))
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


@dataclass
class _StreamLayout:
    """All segments' offsets as rows of the packed stream."""

    cu_seqlens: np.ndarray  # [S + 1]
    starts: np.ndarray  # [spans]
    lengths: np.ndarray  # [spans]
    text: np.ndarray  # [T - V]
    after_query: np.ndarray  # [Q], the row after each query row: never inside a span, so it can be followed
    query_segment: np.ndarray  # [Q]
    span_segment: np.ndarray  # [spans]
    supervised: np.ndarray  # [R]
    segments: Sequence[SegmentLayout]

    @classmethod
    def of(cls, segments: Sequence[SegmentLayout]) -> _StreamLayout:
        cu_seqlens = np.concatenate([[0], np.cumsum([s.length for s in segments])]).astype(np.int64)
        starts, lengths, span_segment, after_query, query_segment, supervised = [], [], [], [], [], []
        for index, (segment, base) in enumerate(zip(segments, cu_seqlens[:-1].tolist(), strict=True)):
            _check_segment(segment)
            starts += [base + span.start for span in segment.spans]
            lengths += [span.length for span in segment.spans]
            span_segment += [index] * len(segment.spans)
            after_query += [base + offset + 1 for offset in segment.query_offsets]
            query_segment += [index] * len(segment.query_offsets)
            supervised += [base + offset for offset in segment.supervised_offsets]
        is_text = np.ones(int(cu_seqlens[-1]), dtype=bool)
        for start, length in zip(starts, lengths, strict=True):
            is_text[start : start + length] = False

        def rows(values: list[int]) -> np.ndarray:
            return np.array(values, dtype=np.int64)

        return cls(
            cu_seqlens=cu_seqlens,
            starts=rows(starts),
            lengths=rows(lengths),
            text=np.flatnonzero(is_text),
            after_query=rows(after_query),
            query_segment=rows(query_segment),
            span_segment=rows(span_segment),
            supervised=rows(supervised),
            segments=segments,
        )

    def rows_that_rank(self, drop: Drop) -> tuple[np.ndarray, np.ndarray]:
        """[Q] the row after each row that ranks, and its segment."""
        if drop.queries == "answer":
            return self.after_query, self.query_segment
        rows, owners = [], []
        for index, segment in enumerate(self.segments):
            if segment.spans:
                own = _instruction(segment) + self.cu_seqlens[index] + 1
                rows.append(own)
                owners.append(np.full(len(own), index))
        return _joined(rows), _joined(owners)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def _instruction(segment: SegmentLayout) -> np.ndarray:
    """Offsets of the text behind the last image up to the first query row behind that; where there is none, the
    segment's last query row: the last image's own last token, if an answer follows it at once."""
    last = segment.spans[-1].end
    behind = [offset for offset in segment.query_offsets if offset >= last]
    return np.arange(last, min(behind) + 1) if behind else np.array([max(segment.query_offsets)])


def _check_segment(segment: SegmentLayout) -> None:
    end = 0
    for span in segment.spans:
        if span.start < end or span.length < 0 or span.end > segment.length:
            raise ValueError(f"image span {span} overlaps another or leaves its segment of {segment.length} tokens")
        end = span.end
    for offset in segment.query_offsets:
        if not 0 <= offset < segment.length:
            raise ValueError(f"query row {offset} lies outside its segment of {segment.length} tokens")
        if any(span.start <= offset < span.end - 1 for span in segment.spans):
            raise ValueError(f"query row {offset} lies inside an image; only an image's last token can rank")
    for offset in segment.supervised_offsets:
        if not 1 <= offset < segment.length or any(span.start <= offset < span.end for span in segment.spans):
            raise ValueError(f"supervised token {offset} is the segment's first, outside it, or inside an image")
    if segment.spans and not segment.query_offsets:
        raise ValueError("a segment with images needs at least one query row to rank their tokens")


def _rows_before(layout: _StreamLayout, places: _Places, rows: np.ndarray) -> np.ndarray:
    """The row just before each of ``rows`` at a stage, in the same segment."""
    before = places.of(rows) - 1
    segment = np.searchsorted(layout.cu_seqlens, rows - 1, side="right") - 1
    if (before < places.of(layout.cu_seqlens)[segment]).any():
        raise ValueError(
            "an image at the very start of a sample keeps no token at this ratio, so nothing is left to predict from; "
            "raise the keep ratio or begin the template with a token"
        )
    return before


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
    span_rows = before.spans()
    cu_seqlens = before.of(layout.cu_seqlens)
    after_query, query_segment = layout.rows_that_rank(drop)
    query_rows = _rows_before(layout, before, after_query)
    scored: list[ScoredSegment] = []
    scored_queries: list[np.ndarray] = []
    offset_in_scored: dict[int, int] = {}
    length_so_far = 0
    for index in np.unique(layout.span_segment).tolist():
        own = query_rows[query_segment == index]
        start, end = int(cu_seqlens[index]), int(cu_seqlens[index + 1])
        taken = sum(len(rows) for rows in scored_queries)
        scored.append(ScoredSegment(start, end, taken, taken + len(own)))
        scored_queries.append(own)
        offset_in_scored[index] = length_so_far - start
        length_so_far += end - start
    sizes = original if drop.returns else before.kept
    sorted_starts = np.cumsum([0, *sizes])[:-1]
    shifts = [offset_in_scored[index] for index in layout.span_segment.tolist()]
    text_rows, next_visual_rows = before.of(layout.text), _joined(after.spans())
    next_order = np.empty(int(after.of(layout.cu_seqlens)[-1]), dtype=np.int64)
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
        visual_in_scored=torch.from_numpy(_joined([r + s for r, s in zip(span_rows, shifts, strict=True)])),
        next_order=torch.from_numpy(next_order),
        next_visual_rows=torch.from_numpy(next_visual_rows),
        spans=_span_layouts(layout, before.kept, after.kept, original),
        drop=drop,
        uniform=uniform,
    )


def _span_layouts(
    layout: _StreamLayout, before: np.ndarray, after: np.ndarray, original: np.ndarray
) -> tuple[SpanLayout, ...]:
    spans: list[SpanLayout] = []
    for index, segment in enumerate(layout.segments):
        for number, span in enumerate(segment.spans):
            i = len(spans)
            spans.append(
                SpanLayout(index, number, int(original[i]), int(before[i]), int(after[i]), span.grids, segment.key)
            )
    return tuple(spans)


def _uniform_scores(layout: _StreamLayout, kept: np.ndarray, sizes: list[int]) -> Tensor | None:
    """Scores for spans of segments that a visual token would rank: 1 on an even grid of the kept count, else 0."""
    last_visual = set((layout.starts + layout.lengths - 1).tolist())
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
            scores[((np.arange(keep) + 0.5) * size / max(keep, 1)).astype(np.int64)] = 1.0
        parts.append(scores)
    return torch.from_numpy(np.concatenate(parts)) if by_visual else None
