"""Linear attention layers (gated delta rule) on packed batches.

Such a layer mixes tokens with a short convolution and a recurrent state. transformers' PyTorch code does not support
segment bounds: in a packed batch, each sample would continue from the state of the previous one. The layer's own
``forward`` therefore runs on padded batches with one segment per row.

Rows are padded on the left, as transformers pads prompts: convolution and state are zero after padding, so outputs
and final states are exact. Rows are padded to a multiple of :data:`~vtprune_train.core.flops.DELTA_CHUNK` tokens, the
chunk size of the delta rule. The last chunk then ends with the segment, so the formula for a segment does not depend on
the lengths of the others. Its rounding may: matrix products of other sizes can round differently.

Segments of similar lengths form one padded batch (a group), so that memory and FLOPs follow the number of tokens: at
most :data:`MAX_PADDING` of the rows of a group are padding. Where parameters are gathered around each call of a
submodule (ZeRO-3), all segments are one group, because every rank must call a module equally often.

Shape suffixes: T tokens of the packed stream, S segments of a group, W columns of its padded batch, R = sum of S * W
over the groups, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from vtprune_train.core.flops import DELTA_CHUNK
from vtprune_train.core.stream import to_device
from vtprune_train.models import HFModule
from vtprune_train.models.cache import StateLayer
from vtprune_train.models.forward.attention import Packing
from vtprune_train.models.forward.calls import State
from vtprune_train.models.forward.sharding import gathers_submodules

MAX_PADDING = 1 / 3  # share of a group's rows that may be padding; more groups would need more kernel launches
MIXER = "linear_attn"  # name of the linear attention in a decoder layer


def layers_that_attend(text_model: HFModule) -> tuple[int, ...]:
    """The decoder layers with attention, counted from 0; the others have linear attention."""
    return tuple(index for index, layer in enumerate(text_model.layers) if MIXER not in layer._modules)


def forward(
    self: HFModule,
    original: Callable[..., Tensor],
    state: State,
    hidden_states: Tensor,
    cache_params: Any = None,
    packing: Packing | None = None,
    staged_decoding: bool = False,
    **inputs: Any,
) -> Tensor:
    """Forward of a linear attention layer: a packed batch [1, T, C] with the segment lengths in ``packing``, or a
    decoding step [B, 1, C]; the result has the shape of ``hidden_states``. Other calls run the original ``forward``."""
    if staged_decoding:
        return original(hidden_states=hidden_states, cache_params=cache_params)
    if packing is None:
        return original(hidden_states=hidden_states, cache_params=cache_params, **inputs)
    if cache_params is None:
        return _run_padded(self, original, hidden_states, packing, None)
    cache: DynamicCache = cache_params.cache
    layer: StateLayer = cache.layers[self.layer_idx]  # type: ignore[assignment]
    if not layer.is_filled:
        return _run_padded(self, original, hidden_states, packing, cache)
    return _run_by_length(original, hidden_states, packing, cache, self.layer_idx)


@dataclass(frozen=True)
class _Padded:
    """The padded batches of a stage.

    ``gather`` [R] int64, row of the packed batch for each column of the padded batches (padding repeats the segment's
    first token); ``is_token``, [S, W] bool for each group; ``scatter`` [T] int64, column of each row; ``order`` [rows]
    int64, index of each segment in the concatenated groups.
    """

    gather: Tensor
    is_token: tuple[Tensor, ...]
    scatter: Tensor
    order: Tensor


def _run_padded(
    self: HFModule, original: Callable[..., Tensor], hidden_1TC: Tensor, packing: Packing, cache: DynamicCache | None
) -> Tensor:
    """[1, T, C]: all segments from an empty state."""
    lengths, one_group = packing.lengths["segment_lengths"], gathers_submodules(self)
    key = ("padded", one_group)
    if key not in packing.of_stage:
        packing.of_stage[key] = to_device(padded(lengths, one_group), hidden_1TC.device)
    batches: _Padded = packing.of_stage[key]
    padded_RC = hidden_1TC[0].index_select(0, batches.gather)
    parts = padded_RC.split([is_token.numel() for is_token in batches.is_token])
    caches = [cache] * len(parts) if cache is None or len(parts) == 1 else [_cache_of(cache) for _ in parts]
    outputs = [
        original(
            hidden_states=part_RC.unflatten(0, is_token.shape), cache_params=cache_of_part, attention_mask=is_token
        ).flatten(0, 1)
        for part_RC, is_token, cache_of_part in zip(parts, batches.is_token, caches, strict=True)
    ]
    if cache is not None and len(parts) > 1:
        layer: StateLayer = cache.layers[self.layer_idx]  # type: ignore[assignment]
        layer.join([part.layers[self.layer_idx] for part in caches], batches.order)  # type: ignore[union-attr, misc]
    out_RC = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out_RC.index_select(0, batches.scatter).unsqueeze(0)


def _cache_of(cache: DynamicCache) -> DynamicCache:
    """A cache with empty states for a group of rows."""
    part = DynamicCache()
    part.layers = [StateLayer() if isinstance(layer, StateLayer) else layer for layer in cache.layers]
    return part


def padded(lengths: Sequence[int], one_group: bool) -> _Padded:
    """The padded batches of segments of these lengths, with NumPy arrays in place of tensors."""
    starts = np.cumsum([0, *lengths])
    last = max(int(starts[-1]) - 1, 0)  # an empty segment has no first token
    gathers, masks, scatter, columns = [], [], np.zeros(starts[-1], dtype=np.int64), 0
    groups = [np.arange(len(lengths))] if one_group else groups_of(lengths)
    for rows in groups:
        length_S = np.array(lengths)[rows]
        width = max(int(_chunks(length_S).max()), 1) * DELTA_CHUNK
        offset_SW = np.arange(width)[None, :] - (width - length_S)[:, None]
        is_token = offset_SW >= 0
        row_SW = starts[rows][:, None] + np.maximum(offset_SW, 0)
        gathers.append(np.minimum(row_SW, last).ravel())
        masks.append(is_token)
        scatter[row_SW[is_token]] = columns + np.flatnonzero(is_token.ravel())
        columns += is_token.size
    order = np.argsort(np.concatenate(groups))
    return _Padded(np.concatenate(gathers), tuple(masks), scatter, order)  # type: ignore[arg-type]


def groups_of(lengths: Sequence[int]) -> list[np.ndarray]:
    """Indices of the segments of each group, from the longest segments to the shortest: as few groups as possible
    while at most :data:`MAX_PADDING` of the rows of a group are padding, not counting that of a segment's first
    chunk."""
    chunks = np.maximum(_chunks(np.array(lengths)), 1)
    groups: list[list[int]] = []
    filled = 0  # chunks of the last group's segments
    for index in np.argsort(-chunks, kind="stable").tolist():
        size = int(chunks[index])
        rows = int(chunks[groups[-1][0]]) * (len(groups[-1]) + 1) if groups else 0
        if groups and rows - filled - size <= MAX_PADDING * rows:
            groups[-1].append(index)
            filled += size
        else:
            groups.append([index])
            filled = size
    return [np.sort(group) for group in groups]


def _chunks(lengths: np.ndarray) -> np.ndarray:
    return -(-lengths // DELTA_CHUNK)


@dataclass(frozen=True)
class _SameLength:
    """Segments of one length: ``tokens`` [S * length] int64, their rows of the packed batch, and ``rows`` [S] int64,
    their rows of the cache."""

    length: int
    tokens: Tensor
    rows: Tensor


def _run_by_length(
    original: Callable[..., Tensor], hidden_1TC: Tensor, packing: Packing, cache: DynamicCache, index: int
) -> Tensor:
    """[1, T, C]: segments that continue the states of layer ``index`` in ``cache``. One call for all rows of the same
    length, because padding before the new tokens would shift the convolution and decay the state."""
    if "by_length" not in packing.of_stage:
        packing.of_stage["by_length"] = to_device(by_length(packing.lengths["segment_lengths"]), hidden_1TC.device)
    groups, back = packing.of_stage["by_length"]
    layer: StateLayer = cache.layers[index]  # type: ignore[assignment]
    parts = []
    for group in groups:
        part = DynamicCache()
        part.layers = [*cache.layers]
        part.layers[index] = layer.of_rows(group.rows)
        hidden = hidden_1TC[0].index_select(0, group.tokens).unflatten(0, (len(group.rows), group.length))
        parts.append(original(hidden_states=hidden, cache_params=part).flatten(0, 1))
        layer.put_rows(group.rows, part.layers[index])
    return torch.cat(parts).index_select(0, back).unsqueeze(0)


def by_length(lengths: Sequence[int]) -> tuple[tuple[_SameLength, ...], np.ndarray]:
    """The groups of segments of equal length, with NumPy arrays in place of tensors; and [T] int64, the place of each
    row in the concatenated groups."""
    starts, groups = np.cumsum([0, *lengths]), []
    for length in sorted(set(lengths) - {0}):
        rows = np.flatnonzero(np.array(lengths) == length)
        tokens = (starts[rows][:, None] + np.arange(length)).ravel()
        groups.append(_SameLength(length, tokens, rows))  # type: ignore[arg-type]
    return tuple(groups), np.argsort(np.concatenate([group.tokens for group in groups]))
