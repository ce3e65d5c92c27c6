"""What a call over padded rows adds to the packed stream: its positions, and how its tokens join the cache.

Shape suffixes: B rows, L padded length, T tokens of the packed stream.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from vtprune_train.models.cache import PackedCache, StageCache, StagedLayer
from vtprune_train.models.calls import Call
from vtprune_train.models.decoder import Staging
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.stream import Boundary, ScoredSegment, Stage, StreamPlan, map_leaves


def plan_staging(
    plan: StreamPlan,
    method: PruningMethod | None,
    num_rows: int,
    cache: DynamicCache | None,
    length: int,
    device: torch.device,
) -> Staging:
    """Positions of every stage, and how its tokens join the cache."""
    if cache is None:
        return Staging(tuple(stage.position_ids.to(device) for stage in plan.stages))
    layers: list[StagedLayer] = cache.layers  # type: ignore[assignment]
    width = cache.get_seq_length()
    cached = [_cached_lengths(layers[stage.first_layer], num_rows) for stage in plan.stages]
    stages = tuple(
        StageCache.of(
            stage.segment_lengths, own, layers[stage.first_layer].get_seq_length(),
            width + length if index == 0 else None, device,
        )
        for index, (stage, own) in enumerate(zip(plan.stages, cached, strict=True))
    )  # fmt: skip
    positions = tuple(
        stage.position_ids.to(device) + torch.from_numpy(np.repeat(own, stage.segment_lengths)).to(device)
        for stage, own in zip(plan.stages, cached, strict=True)
    )
    staging = Staging(positions, PackedCache(cache), stages)
    if width and method is not None:
        next_layer = method.rank_with == "next_layer"
        ranking = list(zip(plan.stages[:-1], plan.boundaries, cached[1:] if next_layer else cached[:-1], strict=True))
        staging.ranked_keys = tuple(
            StageCache.of(stage.segment_lengths, own, layers[boundary.layer].get_seq_length(), None, device)
            for stage, boundary, own in ranking
            if next_layer
        )
        staging.ranked_boundaries = tuple(
            map_leaves(_behind_cached(boundary, stage, own), Tensor, lambda tensor: tensor.to(device))
            for stage, boundary, own in ranking
        )
    return staging


def _cached_lengths(layer: StagedLayer, num_rows: int) -> list[int]:
    return layer.num_tokens().tolist() if layer.get_seq_length() else [0] * num_rows


def _behind_cached(boundary: Boundary, stage: Stage, cached: list[int]) -> Boundary:
    """``boundary`` with its rows counted among [cached and new keys], row of the batch after row."""
    starts = stage.cu_seqlens.numpy().astype(np.int64)
    above = np.cumsum([0, *cached])  # cached keys of the rows of the batch above each
    query_rows, in_scored = boundary.query_rows.clone(), boundary.visual_in_scored.clone()
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
        own = (boundary.visual_in_scored >= scored_end) & (
            boundary.visual_in_scored < scored_end + segment.end - segment.start
        )
        cached_so_far += cached[row]
        in_scored[own] += cached_so_far
        scored_end += segment.end - segment.start
    return dataclasses.replace(boundary, query_rows=query_rows, visual_in_scored=in_scored, segments=tuple(segments))


def use_three_parts(
    staging: Staging, call: Call, position_ids: Tensor | None, token_rows: Tensor, cache: DynamicCache | None
) -> None:
    """Put [3, T] positions into the first stage, and how far they lead the tokens' number into the cache.

    They come from the family (counting this call), or from the caller (as ``generate`` passes them), or count tokens.
    """
    counted = staging.positions[0]
    first: StagedLayer | None = None if cache is None else cache.layers[0]  # type: ignore[assignment]
    lengths = torch.tensor([segment.length for segment in call.segments], device=counted.device)
    row = torch.repeat_interleave(lengths)
    continues = first is not None and first.get_seq_length() > 0
    if call.positions is not None:
        positions = call.positions.to(counted.device).flatten(1, 2).index_select(1, token_rows)
        if first is not None and continues:
            positions = positions + first.next_positions()[row]
    elif position_ids is not None and position_ids.ndim == 3 and (not continues or call.image_lengths):
        positions = position_ids[-3:].flatten(1, 2).index_select(1, token_rows)
        if call.prompt_width is not None:
            # What generate appends follows the last column, which is padding in rows padded on the right.
            generated = token_rows % position_ids.shape[-1] >= call.prompt_width
            ahead = _lead(positions[:, ~generated], counted[~generated], row[~generated], len(lengths))
            positions = torch.where(generated, counted + ahead[row], positions)
    else:
        cached_ahead = None if first is None else first.ahead
        positions = (counted if cached_ahead is None else counted + cached_ahead[row]).expand(3, -1)
    staging.positions = (positions, *staging.positions[1:])
    if first is not None:
        first.ahead = _lead(positions, counted, row, len(lengths))


def _lead(positions: Tensor, counted: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """[B]: how far each row's highest position lies ahead of its last token's number."""
    zeros = counted.new_zeros(num_rows)
    highest = zeros.scatter_reduce(0, row, positions.amax(dim=0), "amax")
    return highest - zeros.scatter_reduce(0, row, counted, "amax")
