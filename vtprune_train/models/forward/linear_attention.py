"""Linear attention layers (gated delta rule) on packed batches.

Such a layer mixes tokens with a short convolution and a recurrent state. transformers' PyTorch code does not support
segment bounds: in a packed batch, each sample would continue from the state of the previous one. The layer's own
``forward`` therefore runs once on a padded batch with one segment per row.

Rows are padded on the left, as transformers pads prompts: convolution and state are zero after padding, so outputs
and final states are exact. Rows are padded to a multiple of :data:`CHUNK` tokens, the chunk size of the delta rule.
The last chunk then ends with the segment, so the result of a segment does not depend on the lengths of the others.

Shape suffixes: T tokens of the packed stream, S segments, W columns of the padded batch, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from vtprune_train.core.stream import to_device
from vtprune_train.models import HFModule
from vtprune_train.models.cache import StateLayer
from vtprune_train.models.forward.attention import Packing
from vtprune_train.models.forward.calls import State

CHUNK = 64
MIXER = "linear_attn"  # name of the linear attention in a decoder layer


def attending_layers(text_model: HFModule) -> tuple[int, ...]:
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
    lengths = packing.lengths["segment_lengths"]
    if cache_params is None:
        return _run_padded(original, hidden_states, lengths, None)
    cache: DynamicCache = cache_params.cache
    layer: StateLayer = cache.layers[self.layer_idx]  # type: ignore[assignment]
    if not layer.is_filled:
        return _run_padded(original, hidden_states, lengths, cache)
    return _run_by_length(original, hidden_states, lengths, cache, self.layer_idx)


def _run_padded(
    original: Callable[..., Tensor], hidden_1TC: Tensor, lengths: tuple[int, ...], cache: DynamicCache | None
) -> Tensor:
    """[1, T, C]: all segments, each from an empty state. One call, because under ZeRO-3 every rank must call the module
    the same number of times."""
    gather, is_token, scatter = _left_padded(lengths, hidden_1TC.device)
    padded_SWC = hidden_1TC[0].index_select(0, gather).unflatten(0, is_token.shape)
    out_SWC = original(hidden_states=padded_SWC, cache_params=cache, attention_mask=is_token)
    return out_SWC.flatten(0, 1).index_select(0, scatter).unsqueeze(0)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # disable inference mode: tensors cached during evaluation are reused in training
def _left_padded(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """``gather`` [S * W] int64, the row of the packed batch for each column of the padded batch (padding repeats the
    segment's first token); ``is_token`` [S, W] bool; ``scatter`` [T] int64, the column of each row."""
    length_S = np.array(lengths)
    width = -(-int(length_S.max()) // CHUNK) * CHUNK
    starts, padding = np.cumsum([0, *lengths])[:-1], width - length_S
    offset_SW = np.arange(width)[None, :] - padding[:, None]
    last = max(int(length_S.sum()) - 1, 0)  # an empty segment has no first token
    gather = np.minimum(starts[:, None] + np.maximum(offset_SW, 0), last)
    is_token = offset_SW >= 0
    on_device: tuple[Tensor, Tensor, Tensor] = to_device(
        (gather.ravel(), is_token, np.flatnonzero(is_token.ravel())), device
    )
    return on_device


def _run_by_length(
    original: Callable[..., Tensor], hidden_1TC: Tensor, lengths: tuple[int, ...], cache: DynamicCache, index: int
) -> Tensor:
    """[1, T, C]: segments that continue the states of layer ``index`` in ``cache``. One call for all rows of the same
    length, because padding before the new tokens would shift the convolution and decay the state."""
    layer: StateLayer = cache.layers[index]  # type: ignore[assignment]
    starts, parts, order = np.cumsum([0, *lengths]), [], []
    for length in sorted(set(lengths) - {0}):
        rows = np.flatnonzero(np.array(lengths) == length)
        tokens = (starts[rows][:, None] + np.arange(length)).ravel()
        at, row_index = to_device((tokens, rows), hidden_1TC.device)
        group = DynamicCache()
        group.layers = [*cache.layers]
        group.layers[index] = layer.of_rows(row_index)
        hidden = hidden_1TC[0].index_select(0, at).unflatten(0, (len(rows), length))
        parts.append(original(hidden_states=hidden, cache_params=group).flatten(0, 1))
        layer.put_rows(row_index, group.layers[index])
        order.append(tokens)
    back = to_device(np.argsort(np.concatenate(order)), hidden_1TC.device)
    return torch.cat(parts).index_select(0, back).unsqueeze(0)
