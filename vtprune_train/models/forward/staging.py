"""Positions and cache layout for padded-row calls.

Shape suffixes: B rows, L padded length, T tokens of the packed stream.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from vtprune_train.core.stream import Boundary, ScoredSegment, Stage, StreamPlan, to_device
from vtprune_train.models.cache import PackedCache, StageCache, StagedLayer, first_attending
from vtprune_train.models.forward.calls import Call
from vtprune_train.models.forward.decoder import Staging, renumbers
from vtprune_train.pruning.base import PruningMethod


def plan_staging(
    plan: StreamPlan,
    method: PruningMethod | None,
    num_rows: int,
    cache: DynamicCache | None,
    device: torch.device,
    three_parts: bool = False,
) -> Staging:
    """Compute the positions of every stage and how its tokens are appended to the cache."""
    if cache is None:
        staging = Staging(to_device(tuple(stage.position_ids for stage in plan.stages), device))
        return replace(staging, replanned=lambda other: plan_staging(other, method, num_rows, None, device))
    return _staging(plan, method, cache, Before.of(cache, num_rows, three_parts), device)


@dataclass(frozen=True)
class Before:
    """Cache state at the start of a call: per layer, each row's token count, next position and number of columns;
    ``columns``, the length as seen by the caller; ``three_parts``, whether the family uses M-RoPE; ``has_images``, 1
    for rows that already had an image."""

    tokens: list[list[int]]
    next_positions: list[list[int]]
    widths: list[int]
    columns: int
    three_parts: bool
    has_images: list[int]

    @classmethod
    def of(cls, cache: DynamicCache, num_rows: int, three_parts: bool) -> Before:
        layers = _with_keys(cache)
        filled = [layer for layer in layers if layer.width]
        none = [[0] * num_rows] * len(layers)
        tokens, next_positions, has_images = none, none, none[0]
        if filled:
            numbers = [*(layer.num_tokens() for layer in filled), *(layer.next_positions() for layer in filled)]
            if (seen := first_attending(cache).has_images) is not None:
                numbers.append(seen)
            read = iter(torch.stack(numbers).tolist())  # the one copy to the host
            tokens, next_positions = ([next(read) if layer.width else none[0] for layer in layers] for _ in range(2))
            has_images = next(read, has_images)
        return cls(
            tokens, next_positions, [layer.width for layer in layers], cache.get_seq_length(), three_parts, has_images
        )


def _with_keys(cache: DynamicCache) -> list[StagedLayer]:
    """For each layer its cache; for a linear attention layer, whose cache has no length, that of the next layer with
    attention (or of the last one)."""
    layers, following = [], next(layer for layer in reversed(cache.layers) if isinstance(layer, StagedLayer))
    for layer in reversed(cache.layers):
        following = layer if isinstance(layer, StagedLayer) else following
        layers.append(following)
    return layers[::-1]


def _staging(
    plan: StreamPlan, method: PruningMethod | None, cache: DynamicCache, before: Before, device: torch.device
) -> Staging:
    joins: list[StageCache] = []
    for stage in plan.stages:
        for layer in range(stage.first_layer, stage.end_layer):
            known = layer > stage.first_layer and before.tokens[layer] == before.tokens[layer - 1]
            if known and before.widths[layer] == before.widths[layer - 1]:
                joins.append(joins[-1])
            else:
                cached_tokens = before.tokens[layer]
                joins.append(StageCache.of(stage.segment_lengths, cached_tokens, before.widths[layer]))
    keys: list[StageCache] = []
    boundaries: list[Boundary] = []
    layouts: dict[int, Boundary] = {}
    if before.columns and method is not None:
        keys, boundaries = _ranked_among_cached(plan, method, before)
        layouts = _layouts_among_cached(plan, before)
    positions, on_device, ranked_keys, ranked_boundaries, layouts = to_device(
        (_positions(plan, before), tuple(joins), tuple(keys), tuple(boundaries), layouts), device
    )
    return Staging(
        positions, PackedCache(cache), on_device, ranked_keys, ranked_boundaries, layouts, before=before,
        replanned=lambda other: _staging(other, method, cache, before, device),
    )  # fmt: skip


def _ranked_among_cached(
    plan: StreamPlan, method: PruningMethod, before: Before
) -> tuple[list[StageCache], list[Boundary]]:
    """``ranked_keys`` and ``ranked_boundaries`` of :class:`Staging`."""
    keys, boundaries = [], []
    for stage, boundary in zip(plan.stages[:-1], plan.boundaries, strict=True):
        part = method.parts[boundary.drop.owner]
        layer = boundary.layer if part.needs.rank_with == "next_layer" else max(0, stage.end_layer - 1)
        cached_tokens = before.tokens[layer]
        keys.append(StageCache.of(stage.segment_lengths, cached_tokens, before.widths[layer]))
        boundaries.append(_behind_cached(boundary, stage, cached_tokens) if part.needs.rotary else boundary)
    return keys, boundaries


def _layouts_among_cached(plan: StreamPlan, before: Before) -> dict[int, Boundary]:
    """``cached_layouts`` of :class:`Staging`."""
    layouts: dict[int, Boundary] = {}
    for stage, layout in zip(plan.stages, plan.key_layouts, strict=True):
        if layout is not None and layout.spans:
            for layer in range(stage.first_layer, stage.end_layer):
                layouts[layer] = _behind_cached(layout, stage, before.tokens[layer])
    return layouts


def _positions(plan: StreamPlan, before: Before) -> tuple[Tensor, ...]:
    """Positions of each stage, continuing after the cached tokens; M-RoPE positions are set by the family in the first
    stage."""
    positions = []
    for index, stage in enumerate(plan.stages):
        count_tokens = before.three_parts and index == 0
        offsets = (before.tokens if count_tokens else before.next_positions)[stage.first_layer]
        shift = torch.from_numpy(np.repeat(offsets, stage.segment_lengths))
        positions.append(stage.position_ids + shift)
    return tuple(positions)


def settle(cache: DynamicCache, plan: StreamPlan, method: PruningMethod | None, before: Before, length: int) -> None:
    """Update the cache after a call of ``length`` columns: next positions per layer, rows with images, method, and
    caller-visible length. ``before`` is the cache state at the start of the call."""
    first = first_attending(cache)
    known = first.ahead
    following, rows = np.array(before.tokens[0]) + plan.stages[0].segment_lengths, []
    for index, stage in enumerate(plan.stages):
        drop = plan.boundaries[index - 1].drop if index else None
        counts_again = drop is None or (method is not None and renumbers(method.parts[drop.owner], drop))
        if counts_again and not before.three_parts:
            following = np.array(before.next_positions[stage.first_layer]) + stage.segment_lengths
        rows.append(following)
    visual = np.array(plan.stages[-1].segment_lengths) - [segment.num_text for segment in plan.outline.segments]
    has_images = np.maximum(before.has_images, visual > 0)
    settled = to_device(np.stack([*rows, has_images]), first.keys.device)  # [stages + 1, B]
    next_positions, first.has_images = settled[:-1], settled[-1]
    if before.three_parts:
        first.parts = 3
        next_positions = next_positions if known is None else next_positions + known
    for stage, next_position in zip(plan.stages, next_positions, strict=True):
        for layer in cache.layers[stage.first_layer : stage.end_layer]:
            if isinstance(layer, StagedLayer):
                layer.ahead = next_position - layer.num_tokens()
    first.filled_by = method
    first.unstored = before.columns + length - first.width


def _behind_cached(boundary: Boundary, stage: Stage, cached: list[int]) -> Boundary:
    """Return ``boundary`` with row indices relative to the concatenated cached and new keys, batch row by batch row."""
    starts = np.cumsum([0, *stage.segment_lengths])
    above = np.cumsum([0, *cached])  # number of cached keys of the preceding batch rows
    query_rows, in_scored = boundary.query_rows.clone(), boundary.visual_in_scored.clone()
    shift = None if boundary.scored_shift is None else boundary.scored_shift.clone()
    segments, cached_so_far, scored_end = [], 0, 0
    for segment in boundary.segments:
        row = int(np.searchsorted(starts, segment.start, side="right")) - 1
        segments.append(
            ScoredSegment(
                segment.start + int(above[row]), segment.end + int(above[row + 1]),
                segment.query_start, segment.query_end,
            )
        )  # fmt: skip
        query_rows[segment.query_start : segment.query_end] += int(above[row + 1])
        in_segment = (boundary.visual_in_scored >= scored_end) & (
            boundary.visual_in_scored < scored_end + segment.end - segment.start
        )
        cached_so_far += cached[row]
        in_scored[in_segment] += cached_so_far
        if shift is not None:
            shift[in_segment] += cached_so_far
        scored_end += segment.end - segment.start
    return dataclasses.replace(
        boundary, query_rows=query_rows, visual_in_scored=in_scored, segments=tuple(segments), scored_shift=shift
    )


def use_three_parts(
    staging: Staging, call: Call, position_ids: Tensor | None, token_rows: Tensor, cache: DynamicCache | None
) -> None:
    """Set [3, T] M-RoPE positions in the first stage and store their offset from the token count in the cache. They
    come from the family, from the caller (as in ``generate``), or default to token indices.
    """
    counted = staging.positions[0]
    first = None if cache is None else first_attending(cache)
    num_rows = len(call.segments)
    row = to_device(np.repeat(np.arange(num_rows), [segment.length for segment in call.segments]), counted.device)
    continues = first is not None and first.get_seq_length() > 0
    if call.positions is not None:
        positions = call.positions.to(counted.device).flatten(1, 2).index_select(1, token_rows)
        if first is not None and continues:
            positions = positions + first.next_positions()[row]
    elif position_ids is not None and (not continues or call.images or call.videos):
        # Broadcast a single component or a single row, as transformers does.
        position_ids = position_ids.expand(3 if position_ids.ndim == 2 else -1, num_rows, -1)
        positions = position_ids[-3:].flatten(1, 2).index_select(1, token_rows)
        if call.prompt_width is not None:
            # generate appends after the last column, which is padding in right-padded rows.
            generated = token_rows % position_ids.shape[-1] >= call.prompt_width
            ahead = _lead(positions.masked_fill(generated, 0), counted.masked_fill(generated, 0), row, num_rows)
            positions = torch.where(generated, counted + ahead[row], positions)
    else:
        cached_ahead = None if first is None else first.ahead
        positions = (counted if cached_ahead is None else counted + cached_ahead[row]).expand(3, -1)
    staging.positions = (positions, *staging.positions[1:])
    if first is not None:
        first.ahead = _lead(positions, counted, row, num_rows)


def _lead(positions: Tensor, counted: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """[B]: difference between the position of each row's last token and its index. The largest position may
    belong to an earlier video, whose temporal positions can exceed the positions of the text after it."""
    zeros = counted.new_zeros(num_rows)
    last = zeros.scatter_reduce(0, row, counted, "amax")
    of_last = positions.amax(dim=0) * (counted == last[row])
    return zeros.scatter_reduce(0, row, of_last, "amax") - last
