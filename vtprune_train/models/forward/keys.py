"""KV pruning within a layer: dropped keys are masked from later rows of the pass and removed from the layer's cache
afterwards.

The attention backend first runs as usual over all rows and keys. Rows with restricted visibility are then recomputed by
SDPA with a mask per KV head: in training, the rows after the first question; in prefill, none (its last row is the
query row). Selection does not synchronize with the device; filling a cache synchronizes once per layer to read the
counts. With a sliding window, distances are measured in the packed batch during the pass, but in the remaining cache
entries during decoding.

Shape suffixes: T tokens of the new stream, Tk packed keys (cached ones first, row after row), V visual tokens,
Q query rows, L rows or keys of one segment, B rows of the batch, H query heads, G key-value heads, D head size,
W columns of a layer's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune_train.core.plan import fronts_of
from vtprune_train.core.stream import Boundary, SegmentLayout, StreamPlan, to_device
from vtprune_train.models.cache import PackedCache
from vtprune_train.models.forward.attention import causal_mask
from vtprune_train.models.forward.sharding import check_all_heads
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Ranking
from vtprune_train.pruning.needs import HiddenAfter


@dataclass(frozen=True)
class BlindRows:
    """Rows [first, end) of one segment (relative to its start) whose attention is restricted.

    ``visual`` indexes the segment's visual tokens among all visual tokens; ``columns`` [V of the segment] int64 is
    their place in the segment; ``limits`` [V of the segment] int64 is the last row that sees each of them even if its
    key is dropped.
    """

    segment: int
    first: int
    end: int
    visual: slice
    columns: Tensor
    limits: Tensor


class StageKeys:
    """State shared by the key-pruning layers of stage ``index``.

    ``cached`` holds, per layer, the layout within cached plus new keys (empty if nothing was cached); ``has_images``
    tells per row whether its cache contains image keys (``None`` without a cache)."""

    def __init__(
        self,
        plan: StreamPlan,
        index: int,
        method: PruningMethod | None,
        cached: dict[int, Boundary],
        config: Any,
        has_images: Sequence[int] | None,
    ):
        layout, stage = plan.key_layouts[index], plan.stages[index]
        self.layers: set[int] = set()
        if method is None or layout is None or not layout.spans:
            return
        self.layers = set(method.key_layers(plan.outline.num_layers)) & set(range(stage.first_layer, stage.end_layer))
        self.method, self.layout, self.cached, self.config = method, layout, cached, config
        self.segment_lengths = stage.segment_lengths
        blind = blind_rows(plan.outline.segments, layout, self.segment_lengths, method.needs.hidden_after)
        self.blind: tuple[BlindRows, ...] = to_device(tuple(blind), layout.visual_rows.device)
        # Number of new keys before each segment's first image that, together with all cached keys, are masked from
        # later rows.
        self.fronts: list[int | None] = [None] * len(self.segment_lengths)
        if method.needs.hides_front:
            self.fronts = [
                None if has_images is not None and has_images[row] else front
                for row, front in enumerate(fronts_of(plan.outline.segments, layout))
            ]

    def layer(self, layer: int, cache: PackedCache | None) -> KeyChoice | None:
        """Return the KeyChoice of one layer, or ``None`` if the layer keeps all keys."""
        return KeyChoice(self, layer, cache) if layer in self.layers else None


class KeyChoice:
    """Callback for the attention of one layer in one pass. Recomputing the layer reuses the same selection."""

    def __init__(self, stage: StageKeys, layer: int, cache: PackedCache | None):
        self.stage, self.layer, self.cache = stage, layer, cache
        self.kept: Tensor | None = None
        if cache is not None:
            cache.withheld = True

    def __call__(
        self,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        out_THD: Tensor,
        *,
        scaling: float,
        key_lengths: tuple[int, ...] | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        **_: object,
    ) -> Tensor:
        """Return the attention output [T, H, D] with the restricted rows recomputed, and fill the layer's cache."""
        stage = self.stage
        if self.kept is None:
            self.kept = self._choose(q_THD, k_TGD, scaling)
            if self.cache is not None:
                self.cache.fill_kept(self.layer, k_TGD, v_TGD, self._kept_columns(k_TGD.shape[0]), self._left_out())
        if not stage.blind:
            return out_THD
        lengths = stage.segment_lengths
        starts = np.cumsum([0, *lengths]).tolist()
        ends = np.cumsum(key_lengths or lengths).tolist()
        parts, done = [], 0
        for blind in stage.blind:
            first, end = starts[blind.segment] + blind.first, starts[blind.segment] + blind.end
            window = slice(ends[blind.segment] - (key_lengths or lengths)[blind.segment], ends[blind.segment])
            cached = window.stop - window.start - lengths[blind.segment]
            seen_GLL = blind_mask(blind, self.kept[:, blind.visual], cached, window.stop - window.start, sliding_window)
            if (front := stage.fronts[blind.segment]) is not None:
                seen_GLL = seen_GLL.index_fill(2, torch.arange(cached + front, device=seen_GLL.device), False)
            again = _attend(q_THD[first:end], k_TGD[window], v_TGD[window], seen_GLL, scaling, dropout)
            parts += [out_THD[done:first], again]
            done = end
        return torch.cat([*parts, out_THD[done:]])

    @torch.no_grad()
    def _choose(self, q_THD: Tensor, k_TGD: Tensor, scaling: float) -> Tensor:
        """[G, V] bool."""
        layout = self.stage.layout
        reader = f"{self.stage.method.name} (decoder layer {self.layer})"
        check_all_heads(self.stage.config, reader, q_THD.shape[1], k_TGD.shape[1])
        ranking = Ranking(q_THD.detach().index_select(0, layout.query_rows), k_TGD.detach(), scaling)
        kept = self.stage.method.keys(self.layer, ranking, self.stage.cached.get(self.layer, layout))
        assert kept.shape == (k_TGD.shape[1], len(layout.visual_rows)) and kept.dtype == torch.bool, kept.shape
        return kept

    def _kept_columns(self, num_keys: int) -> Tensor:
        """[G, Tk] bool mask of text, cached and kept visual keys."""
        assert self.kept is not None and self.cache is not None and self.cache.stage is not None
        rows, join = self.stage.layout.visual_rows, self.cache.stage
        if join.join is not None:
            rows = join.new_keys(self.stage.segment_lengths).index_select(0, rows)
        kept = torch.ones(self.kept.shape[0], num_keys, dtype=torch.bool, device=rows.device)
        for start, hidden in zip(np.cumsum([0, *join.key_lengths]).tolist(), self._hidden_in_front(), strict=False):
            kept[:, start : start + hidden] = False
        return kept.index_copy(1, rows, self.kept)

    def _hidden_in_front(self) -> list[int]:
        """[B] number of keys before each row's first image (including cached ones) to remove from the cache."""
        assert self.cache is not None and self.cache.stage is not None
        cached = np.subtract(self.cache.stage.key_lengths, self.stage.segment_lengths).tolist()
        return [0 if front is None else front + old for front, old in zip(self.stage.fronts, cached, strict=True)]

    def _left_out(self) -> np.ndarray:
        """[B] number of keys of each row to remove from the cache (the device-to-host copy)."""
        assert self.kept is not None
        spans, layout = self.stage.layout.spans, self.stage.layout
        left = torch.zeros(self.kept.shape[0], len(spans), dtype=torch.int64, device=self.kept.device)
        counts = left.index_add(1, layout.span_of_visual, (~self.kept).long()).cpu().numpy()  # [G, spans]
        if (counts != counts[:1]).any():
            raise ValueError(
                f"{self.stage.method.name}.keys keeps different numbers of an image's tokens in different heads of "
                f"layer {self.layer}; a layer's cache is rectangular, so every head must keep the same number"
            )
        rows = [span.segment for span in spans]
        return np.bincount(rows, counts[0], len(self.stage.segment_lengths)).astype(np.int64) + self._hidden_in_front()


def blind_rows(
    segments: Sequence[SegmentLayout], layout: Boundary, segment_lengths: tuple[int, ...], hidden_after: HiddenAfter
) -> list[BlindRows]:
    """Rows of each segment whose attention is restricted in a stage, computed on the host from lengths only.

    A span's keys are hidden after its last row (``span``), or after the first query row from there on (``query``); an
    image without a following query row is never masked.
    """
    blind: list[BlindRows] = []
    first_visual, laid_out = 0, iter(layout.spans)
    for index, (segment, length) in enumerate(zip(segments, segment_lengths, strict=True)):
        counts = [next(laid_out).before for _ in segment.spans]
        dropped = np.cumsum([0, *(span.length - count for span, count in zip(segment.spans, counts, strict=True))])
        starts = [span.start - before for span, before in zip(segment.spans, dropped.tolist(), strict=False)]
        query_rows = [
            offset - int(dropped[sum(span.end <= offset + 1 for span in segment.spans)])
            for offset in segment.query_offsets
        ]
        limits = []
        for start, count in zip(starts, counts, strict=True):
            last = start + count - 1
            following = [row for row in query_rows if row >= last]
            limits.append(last if hidden_after == "span" else min(following, default=length))
        visual = slice(first_visual, first_visual + sum(counts))
        first_visual = visual.stop
        first = min((limit for limit, count in zip(limits, counts, strict=True) if count), default=length) + 1
        if first < length:
            columns = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)])
            of_columns = torch.from_numpy(np.repeat(limits, counts))
            blind.append(BlindRows(index, first, length, visual, torch.from_numpy(columns), of_columns))
    return blind


def blind_mask(
    blind: BlindRows, kept_GV: Tensor, cached: int, num_keys: int, sliding_window: int | None = None
) -> Tensor:
    """[G, L, Lk] bool: mask of keys visible to each restricted row; the first ``cached`` keys of the segment are cached
    ones."""
    rows = torch.arange(blind.first, blind.end, device=kept_GV.device)
    seen = causal_mask(rows + cached, num_keys, sliding_window)
    shown = kept_GV[:, None, :] | (rows[:, None] <= blind.limits[None, :])  # [G, L, V]
    columns = blind.columns + cached
    return seen.expand(len(kept_GV), -1, -1).index_copy(2, columns, seen.index_select(1, columns) & shown)


def _attend(q_LHD: Tensor, k_LGD: Tensor, v_LGD: Tensor, seen_GLL: Tensor, scaling: float, dropout: float) -> Tensor:
    """[L, H, D]: attention of a few rows, with a mask per key-value head."""
    groups = k_LGD.shape[1]
    q_GHLD = q_LHD.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
    k, v = (x.transpose(0, 1).unsqueeze(1).expand(-1, q_GHLD.shape[1], -1, -1) for x in (k_LGD, v_LGD))
    out = F.scaled_dot_product_attention(
        q_GHLD, k, v, attn_mask=seen_GLL.unsqueeze(1), dropout_p=dropout, scale=scaling
    )
    return out.permute(2, 0, 1, 3).flatten(1, 2)
