"""The nouns everyone shares: the packed stream, its image spans, and the plan of every stage (``plan.py`` makes it).

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

from vtprune_train.core.rounding import floor_of

IMAGE = "<image>"  # an image's place in text, and its token
IGNORE = -100  # a label that is not supervised
COPY_ALIGNMENT = 16  # bytes: where a tensor of any dtype may begin in a buffer


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

    @property
    def num_text(self) -> int:
        """Its tokens outside the images."""
        return self.length - sum(span.length for span in self.spans)


def text_key(ids: np.ndarray) -> int:
    """A number made of a sample's text tokens (without its images), the same in every batch: see ``SegmentLayout``."""
    return zlib.crc32(np.ascontiguousarray(ids, dtype=np.int64).tobytes())


@dataclass(frozen=True)
class Drop:
    """Where and how much a method drops: before decoder layer ``layer`` (0: before the decoder), each span keeps
    ``floor(n * keep)``, exactly (:mod:`vtprune_train.core.rounding`). A subclass may count otherwise by overriding
    :meth:`kept`.

    Args:
        layer: decoder layer, counted from 0, before which tokens change.
        keep: share of the span's ORIGINAL tokens (those that the method found at its first drop), so ratios of
            successive drops are cumulative. Of an adaptive drop: the share expected on average.
        adaptive: the method counts on the device; ``keep`` only serves plans made before.
        returns: all tokens that this method set aside since its first drop come back, with the states they had then.
        adds: more tokens leave than came in (learned ones), so positions are numbered again.
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
        """Tokens of a span that enter the next stage.

        Args:
            length: the span's tokens at the method's first drop.
            before: its tokens in the stage that ends.
        """
        return length if self.returns else floor_of(self.keep, length)


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
    """What a plan was made of, for planning the rest again once an adaptive drop has counted, and ``method``, whose
    plan it is. Host only, so not a dataclass, whose tensors would be copied to the device."""

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
        """Copy every tensor to ``device``, without waiting for a GPU (see :func:`to_device`)."""
        return to_device(self, device)

    def pin_memory(self) -> PackedBatch:
        """Copy every tensor to pinned memory."""
        return map_leaves(self, Tensor, Tensor.pin_memory)


def to_device(value: Any, device: torch.device | str) -> Any:
    """``value`` with every tensor and every NumPy array of it as a tensor on ``device``, without waiting for a GPU.

    A copy from pageable memory would wait until the GPU has done all that was queued before. So what is not pinned is
    put end to end into one pinned buffer, which goes in one copy.

    Args:
        value: tensors and arrays in nested dataclasses, tuples and dicts.
        device: where they go.
    """
    leaves: dict[int, Tensor] = {}
    kinds = (Tensor, np.ndarray)
    map_leaves(value, kinds, lambda leaf: leaves.setdefault(id(leaf), torch.as_tensor(leaf)))
    copies = dict(zip(leaves, _copies(list(leaves.values()), torch.device(device)), strict=True))
    return map_leaves(value, kinds, lambda leaf: copies[id(leaf)])


def _copies(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    pageable = [t for t in tensors if device.type == "cuda" and t.device.type == "cpu" and not t.is_pinned()]
    together = {id(tensor): copy for tensor, copy in zip(pageable, _copied_at_once(pageable, device), strict=True)}
    return [together.get(id(tensor), tensor).to(device, non_blocking=True) for tensor in tensors]


def _copied_at_once(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of CPU tensors on a GPU: parts of one buffer."""
    if not tensors:
        return []
    starts = np.cumsum([0, *(-(-tensor.nbytes // COPY_ALIGNMENT) * COPY_ALIGNMENT for tensor in tensors)]).tolist()
    places = [slice(start, start + tensor.nbytes) for start, tensor in zip(starts, tensors, strict=False)]
    pinned = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    for place, tensor in zip(places, tensors, strict=True):
        pinned[place].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    buffer = pinned.to(device, non_blocking=True)
    return [buffer[place].view(t.dtype).view(t.shape) for place, t in zip(places, tensors, strict=True)]


def map_leaves(value: Any, kind: type | tuple[type, ...], function: Any) -> Any:
    """``value`` with ``function`` applied to everything of type ``kind`` in nested dataclasses, tuples and dicts."""
    if isinstance(value, kind):
        return function(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        mapped = {name: map_leaves(part, kind, function) for name, part in parts.items()}
        changes = {name: part for name, part in mapped.items() if part is not parts[name]}
        return dataclasses.replace(value, **changes) if changes else value
    if isinstance(value, tuple):
        items = tuple(map_leaves(item, kind, function) for item in value)
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    if isinstance(value, dict):
        return {key: map_leaves(item, kind, function) for key, item in value.items()}
    return value
