"""Core data types: packed batches, image spans and stage plans (built in ``plan.py``).

Shape suffixes: T tokens in the stream, S segments, V visual tokens before a boundary, K visual tokens kept by it,
Q query rows, R supervised rows, P tiles.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from vtprune_train.core.rounding import floor_of

IMAGE = "<image>"  # image placeholder in text; also the default image token
VIDEO = "<video>"  # video placeholder in text; also the default video token
IGNORE = -100  # ignore index for labels
COPY_ALIGNMENT = 16  # alignment in bytes of tensors in the shared buffer


@dataclass(frozen=True)
class ImageSpan:
    """The visual tokens of one image or one video within a segment.

    Args:
        start: offset of the first token in the segment.
        length: number of visual tokens.
        grids: the grids ``(rows, columns)`` that the tokens come from, in order (LLaVA-NeXT: the base tile, then the
            unpadded tiles with their newline column); for a video, one for each step in time. Empty if the family does
            not provide them.
        frames: number of steps in time of a video, whose tokens are ordered step by step; 0 for an image.
        runs: ``(start, length)`` of each run of adjacent tokens, if text stands between them, such as the timestamps
            between the frames of Qwen3-VL; empty if all tokens are adjacent.
        tile_tokens: number of tokens that show patches of each tile of an image, without newlines; empty if the family
            has no tiles.
    """

    start: int
    length: int
    grids: tuple[tuple[int, int], ...] = ()
    frames: int = 0
    runs: tuple[tuple[int, int], ...] = ()
    tile_tokens: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """Offset after the last token."""
        return sum(self.runs[-1]) if self.runs else self.start + self.length

    def offsets(self) -> np.ndarray:
        """[length] int64, the offset of each token in the segment."""
        runs = self.runs or ((self.start, self.length),)
        return np.concatenate([np.arange(start, start + length) for start, length in runs])

    def moved(self, by: int) -> ImageSpan:
        """The same tokens ``by`` tokens later."""
        runs = tuple((start + by, length) for start, length in self.runs)
        return dataclasses.replace(self, start=self.start + by, runs=runs)

    def steps(self) -> tuple[ImageSpan, ...]:
        """A video divided into one span for each step in time, with newline tokens in the last one; an image unchanged.
        If the grids of a video are unknown, its runs are its steps, or else equal parts of its tokens.

        Raises:
            ValueError: grids and runs are unknown and the tokens cannot be divided evenly.
        """
        if not self.frames:
            return (self,)
        sizes = [rows * columns for rows, columns in self.grids]
        if sum(sizes) != self.length or len(sizes) < self.frames:
            runs = self.runs or self._equal_parts()
            return tuple(ImageSpan(start, length, frames=1) for start, length in runs)
        last = self.frames - 1
        ends = [*np.cumsum(sizes[:last]).tolist(), self.length]
        offsets, spans, first = self.offsets(), [], 0
        for step, end in enumerate(ends):
            grids = self.grids[step : step + 1] if step < last else self.grids[last:]
            spans.append(ImageSpan(int(offsets[first]), end - first, grids, frames=1))
            first = end
        return tuple(spans)

    def _equal_parts(self) -> tuple[tuple[int, int], ...]:
        """``(start, length)`` of each step in time, if all have equally many tokens."""
        size, rest = divmod(self.length, self.frames)
        if rest:
            raise ValueError(
                f"a video of {self.length} tokens cannot be divided into {self.frames} steps in time (per: frame): the "
                "sizes of its frames are unknown, and the tokens are not a multiple of the steps; use per: video"
            )
        return tuple((self.start + step * size, size) for step in range(self.frames))


@dataclass(frozen=True)
class SegmentLayout:
    """Host-side layout of one sample. Offsets are relative to the segment's first token, before any drop.

    Args:
        length: tokens, text and visual.
        spans: the sample's images, in order, not overlapping.
        query_offsets: tokens whose attention ranks the visual tokens.
        supervised_offsets: target tokens of the loss (each is predicted from the row before it).
        key: hash of the sample's text, used to seed draws independently of the batch.
        question: the text between the last image and the next answer, for methods that read it; otherwise empty.
    """

    length: int
    spans: tuple[ImageSpan, ...] = ()
    query_offsets: tuple[int, ...] = ()
    supervised_offsets: tuple[int, ...] = ()
    key: int = 0
    question: str = ""

    @property
    def num_text(self) -> int:
        """Number of text tokens."""
        return self.length - sum(span.length for span in self.spans)


def text_key(ids: np.ndarray) -> int:
    """Hash of a sample's text tokens (excluding images), independent of the batch; see ``SegmentLayout.key``."""
    return zlib.crc32(np.ascontiguousarray(ids, dtype=np.int64).tobytes())


@dataclass(frozen=True)
class Drop:
    """A drop point: before decoder layer ``layer`` (0: before the decoder), each span of n tokens keeps
    ``floor(n * keep)``, computed exactly (:mod:`vtprune_train.core.rounding`). Subclasses can override :meth:`kept` and
    :meth:`kept_of` to count differently.

    Args:
        layer: decoder layer, counted from 0, before which tokens are dropped or added.
        keep: keep ratio relative to the span's tokens at the method's first drop, so ratios of successive drops are not
            multiplied. For an adaptive drop, the expected mean ratio.
        adaptive: the method determines the counts on the device; ``keep`` is only an estimate for planning.
        returns: restore all tokens this method has set aside since its first drop, with the hidden states they had when
            set aside.
        adds: the drop point also adds learned tokens, so positions must be renumbered.
        queries: which rows are query rows: ``answer``, those that predict the first token of an answer; or
            ``instruction``, the text between a segment's last image and the answer.
        uniform_without_text: keep evenly spaced tokens, instead of ranked ones, in segments whose query row is itself a
            visual token (no text between image and answer, as in projector alignment).
        ranked: whether this drop point needs the attention ranking; some drop points only read hidden states.
        owner: index of the method (in a combination) that performs this drop.

    Attributes:
        compares_frames: the drop compares the steps in time of whole videos, so it must be the first one, and videos
            must not be divided into spans.
    """

    compares_frames: ClassVar[bool] = False

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
        """Number of a span's tokens that enter the next stage.

        Args:
            length: the span's tokens at the method's first drop.
            before: the span's token count in the stage before the drop.
        """
        return length if self.returns else floor_of(self.keep, length)

    def kept_of(self, span: ImageSpan, length: int, before: int) -> int:
        """Like :meth:`kept`, if the span itself is known, as in the plan of a batch: methods for videos count by its
        steps in time. The planner calls only this method if spans are known, and only :meth:`kept` otherwise (budgets
        and estimates); the default is the same number. The result may depend on ``span.grids``, ``span.frames``,
        ``span.tile_tokens`` and ``span.length`` (if it is not ``before``, another method has dropped some of the
        tokens), but not on the place of the span or its runs: spans that agree in the rest are counted once."""
        return self.kept(length, before)


@dataclass
class Stage:
    """Consecutive decoder layers [first_layer, end_layer) that see the same tokens; empty before a drop at layer 0.

    ``position_ids`` [T] int64 count from 0 in each segment (as with ``positions: renumber``); ``cu_seqlens`` [S + 1]
    int32.
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
    """A segment with images at a drop point: its rows [start, end), its query rows and its question (see
    :class:`SegmentLayout`)."""

    start: int
    end: int
    query_start: int
    query_end: int
    question: str = ""


@dataclass(frozen=True)
class SpanLayout:
    """Host-side counts of the visual tokens of one image or video at a drop point.

    Args:
        segment: index of the segment.
        number: index of the span in its segment.
        original: token count at the method's first drop.
        before: token count before this drop.
        after: token count after this drop (for an adaptive drop, the expected one).
        grids, frames: see :class:`ImageSpan`.
        key: see :class:`SegmentLayout`.
        tile_tokens: see :class:`ImageSpan`; empty after an earlier drop.
    """

    segment: int
    number: int
    original: int
    before: int
    after: int
    grids: tuple[tuple[int, int], ...] = ()
    key: int = 0
    frames: int = 0
    tile_tokens: tuple[int, ...] = ()


@dataclass
class Boundary:
    """Host-side description of one drop point. Row indices refer to the packed batch of the stage before it.

    The V candidates are the visual tokens of that stage or, at a return, all tokens present at the method's first drop;
    they are ordered span by span.

    Args:
        layer: first layer after the drop.
        text_rows: [T - V] int64, text rows (always kept).
        visual_rows: [V] int64, rows of the stage's visual tokens, in the order of the candidates.
        span_of_visual: [V] int64, which span each candidate belongs to, ascending.
        take: [K] int64, positions to take after sorting V by (span, descending score); unused if K is not planned or
            exceeds V.
        query_rows: [Q] int64, the query rows of all scored segments, in order.
        segments: the segments that have images.
        visual_in_scored: [V] int64, index of each visual token in the concatenated scored segments.
        next_order: [T_next] int64, indices into the concatenation [text rows, kept tokens] that give the rows of the
            next stage.
        next_visual_rows: [K] int64, rows of the next stage that hold visual tokens.
        spans: all images of the stream, in order.
        drop: the drop; its ``owner`` selects the tokens.
        uniform: [V] float32, scores that select evenly spaced tokens, with NaN for tokens ranked by the method;
            ``None`` if no segment needs them.
        scored_shift: [V] int64, difference between ``visual_in_scored`` and ``visual_rows``, if text stands between the
            tokens of a video. The rows of such a text depend on which visual tokens are kept, so the decoder
            computes ``text_rows``, ``visual_rows``, ``visual_in_scored``, ``next_order`` and ``next_visual_rows`` on
            the device (:func:`vtprune_train.core.interleaved.locate`); their lengths are those planned here. ``None``
            if all rows are known on the host.
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
    scored_shift: Tensor | None = None


class Outline:
    """Inputs of a plan, kept so that it can be recomputed after an adaptive drop, and the ``method`` it was planned
    for. Deliberately not a dataclass: the tensors of dataclasses are copied to the device, and these must stay on the
    host."""

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
    """Plan of a forward pass: ``boundaries[i]`` is the drop point between ``stages[i]`` and ``stages[i + 1]``.

    ``predict_rows`` [R] int64 are the rows of the LAST stage whose next token is supervised. ``key_layouts[i]``
    describes stage i as a no-drop boundary if keys are pruned in one of its layers; otherwise ``None``.
    """

    stages: tuple[Stage, ...]
    boundaries: tuple[Boundary, ...]
    predict_rows: Tensor
    key_layouts: tuple[Boundary | None, ...]
    outline: Outline


@dataclass
class TeacherPass:
    """A second, gradient-free pass over the same batch that serves as distillation teacher.

    Args:
        plan: its stages.
        weight: weight of the KL divergence in the loss.
        temperature: softmax temperature of both distributions.
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
        visual_index: [V] int64, feature index for each visual row: a row of [projected features of all tiles;
            image_newline], or of the features the family computes from ``image_inputs``.
        pixel_values: [P, ...] float32, the tiles (or patches) of all images; one blank tile if no sample has an image.
        plan: the stages.
        targets: [R] int64, the supervised tokens, in the order of ``plan.predict_rows``.
        answer_of_target: [R] int64, answer index of each target within the batch.
        num_answers: answers in the batch.
        sample_ids: the samples packed, in order (host only).
        targets_per_sample: number of targets per sample (host only).
        unreadable: (sample id, reason) of samples skipped because an image could not be read (host only).
        costs: cost metrics for logging, computed from lengths (host only).
        image_inputs: extra inputs of the family's ``get_image_features``; tensors are moved to the device, tuples of
            ints stay on the host; ``None`` for families that index tile features directly.
        positions: [parts, T] int64 multi-dimensional position ids (M-RoPE) that are never renumbered; ``None`` if
            positions are plain token indices per segment.
        teacher: the pruned teacher pass of a full-token step; otherwise ``None``.
        video_pixels: [1, frames, 3, height, width] float32, the frames of all videos, in families that compute video
            features separately; these are indexed after those of the images. One blank frame if no sample has a video.
            ``None`` if the run has no videos or the family treats them like images.
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
    video_pixels: Tensor | None = None

    def to(self, device: torch.device | str) -> PackedBatch:
        """Copy every tensor to ``device`` without synchronizing (see :func:`to_device`)."""
        return to_device(self, device)

    def pin_memory(self) -> PackedBatch:
        """Copy every tensor to pinned memory."""
        return map_leaves(self, Tensor, Tensor.pin_memory)


def to_device(value: Any, device: torch.device | str) -> Any:
    """Return ``value`` with all its tensors and NumPy arrays moved to ``device``, without synchronizing.

    A copy from pageable memory would block until all queued GPU work is done, so unpinned tensors are concatenated into
    one pinned buffer and copied at once.

    Args:
        value: tensors and arrays in nested dataclasses, tuples and dicts.
        device: target device.
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
    """Copy CPU tensors to the GPU in one transfer; the results are views of one buffer."""
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
    """Apply ``function`` to every object of type ``kind`` in nested dataclasses, tuples and dicts, and return the
    result."""
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
