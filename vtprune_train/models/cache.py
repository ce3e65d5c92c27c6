"""Staged KV cache: each layer stores the tokens of its stage, left-padded per row.

A ``transformers.DynamicCache`` whose layers are :class:`StagedLayer`, so ``generate``, beam search and other users of a
cache keep working; linear attention layers have a :class:`StateLayer`. The first layer with attention holds the data of
the whole cache, and defines the sequence length.

Shape suffixes: B rows, G key-value heads, W columns of a layer's cache, D head size, T tokens of the packed stream.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionLayer

from vtprune_train.core.stream import to_device
from vtprune_train.models.families.layout import Grids
from vtprune_train.pruning.base import PruningMethod

# Preallocate 1/16 extra columns for decoding: the occasional reallocation and the extra memory are both negligible.
LEAST_ROOM = 16
ROOM_SHARE = 16

Layouts = tuple[tuple[tuple[Grids, int], ...], ...]
"""The grids and steps in time of each row's images and videos."""


@dataclass(frozen=True)
class Conversation:
    """Decoder inputs of the conversation so far, in the caller's columns: ``embeds`` [B, W, C]; ``image`` [B, W] int64,
    index of the image or video within the row, or a marker for text/padding; ``layouts``, the grids and steps in time
    of each row's images and videos."""

    TEXT: ClassVar[int] = -1
    PADDING: ClassVar[int] = -2

    embeds: Tensor
    image: Tensor
    layouts: Layouts

    def and_then(self, embeds: Tensor, image: Tensor, layouts: Layouts | None = None) -> Conversation:
        """Return a copy with the next columns and the layouts of their images and videos appended."""
        both = self.layouts if layouts is None else tuple(a + b for a, b in zip(self.layouts, layouts, strict=True))
        return Conversation(torch.cat([self.embeds, embeds], dim=1), torch.cat([self.image, image], dim=1), both)

    def rows(self, function: Callable[[Tensor], Tensor]) -> Conversation:
        """Return a copy with rows selected or reordered by ``function``."""
        numbers = function(torch.arange(len(self.layouts), device=self.image.device)).tolist()
        return Conversation(
            function(self.embeds), function(self.image), tuple(self.layouts[number] for number in numbers)
        )


class StagedLayer(DynamicLayer):
    """One layer's keys and values [B, G, W, D]; the first ``padding[b]`` columns of row b are not tokens.

    ``padding`` [B] int64; ``is_padded`` is a host-side flag for any(padding > 0); ``compacted`` is true if keys were
    dropped in this layer, so its padding differs from the rest of its stage. ``ahead`` [B] int64 is the row's next
    position minus its number of cached tokens. It is non-zero if tokens were dropped with positions kept, or with
    M-RoPE; ``None`` if positions equal token indices. First attending layer only: ``has_images`` [B] int64, 1 for rows
    that had an image; ``unstored``, number of caller-visible columns not stored in the layer; ``parts``, number of
    position components; ``conversation``, decoder inputs rerun in later turns with ``multi_turn: keep_dense``;
    ``filled_by``, the method used to fill the cache.
    """

    is_initialized: bool

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        self.padding: Tensor | None = None
        self.is_padded = False
        self.compacted = False
        self.ahead: Tensor | None = None
        self.has_images: Tensor | None = None
        self.unstored = 0
        self.parts = 1
        self.conversation: Conversation | None = None
        self.filled_by: PruningMethod | None = None
        self._room: tuple[Tensor, Tensor] | None = None  # buffers that keys and values are views of

    def fill(self, keys: Tensor, values: Tensor, padding: Tensor, is_padded: bool) -> None:
        """Replace the contents with keys and values [B, G, W, D] and ``padding`` [B]."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys, self.values, self.padding, self.is_padded = keys, values, padding, is_padded
        self._room = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns into preallocated space, so that a decoding step writes one column without copying the
        cache."""
        assert self.keys is not None and self.values is not None
        if torch.is_grad_enabled() and (key_states.requires_grad or self.keys.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)
        old, end = self.width, self.width + key_states.shape[-2]
        if not self._has_room(end):
            self._room = _with_room(self.keys, end), _with_room(self.values, end)
        assert self._room is not None
        for store, new in zip(self._room, (key_states, value_states), strict=True):
            store[:, :, old:end] = new
        self.keys, self.values = (store[:, :, :end] for store in self._room)
        return self.keys, self.values

    def _has_room(self, columns: int) -> bool:
        """Whether the keys are still a view of the preallocated buffer (not reordered or replaced) and the new columns
        fit."""
        if self._room is None or self._room[0].shape[-2] < columns:
            return False
        if self._room[0].is_inference() and not torch.is_inference_mode_enabled():
            return False
        return all(
            view.data_ptr() == store.data_ptr()
            and view.stride() == store.stride()
            and view.shape[:2] == store.shape[:2]
            for view, store in zip((self.keys, self.values), self._room, strict=True)
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Only called by a dense model, which cannot use a staged cache."""
        raise ValueError(
            "past_key_values was filled by a pruned model, whose layers hold different numbers of tokens, so a dense "
            "model cannot use it; start with a new DynamicCache"
        )

    @property
    def width(self) -> int:
        """Number of stored columns."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0

    def get_seq_length(self) -> int:
        """Sequence length as seen by the caller (the cache queries its first layer)."""
        return self.width + self.unstored

    def reset(self) -> None:
        self.keys = self.values = None  # type: ignore[assignment]
        self.is_initialized = False  # otherwise transformers 5.17 zeroes the columns and keeps them
        super().reset()
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(lambda rows: rows[indices])

    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        self.padding = None if self.padding is None else function(self.padding)
        self.ahead = None if self.ahead is None else function(self.ahead)
        self.has_images = None if self.has_images is None else function(self.has_images)
        if self.conversation is not None:
            self.conversation = self.conversation.rows(function)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): a staged cache only supports a negative number, the number of tokens to "
                "remove"
            )
        super().crop(tokens_to_remove)
        if self.conversation is not None and tokens_to_remove < 0:
            embeds, image = (
                columns[:, :tokens_to_remove] for columns in (self.conversation.embeds, self.conversation.image)
            )
            self.conversation = replace(self.conversation, embeds=embeds, image=image)

    def next_positions(self) -> Tensor:
        """[B] int64, the position of each row's next token."""
        return self.num_tokens() if self.ahead is None else self.num_tokens() + self.ahead

    def num_tokens(self) -> Tensor:
        """[B] int64, number of cached tokens per row."""
        assert self.padding is not None, "the number of tokens is not defined for an empty layer"
        return self.keys.shape[-2] - self.padding


class StateLayer(LinearAttentionLayer):
    """State of one linear attention layer: for each row, the last inputs of its convolution ``conv_states`` [B,
    channels, kernel] and the recurrent state ``recurrent_states`` [B, heads, key size, value size]. It has no length. A
    token that is dropped later remains part of the states of earlier layers."""

    @property
    def is_filled(self) -> bool:
        return bool(self.has_previous_state[0])

    def of_rows(self, rows: Tensor) -> Self:
        """A copy with the states of ``rows`` [n] int64."""
        part = copy.copy(self)
        part.conv_states, part.recurrent_states = dict(self.conv_states), dict(self.recurrent_states)
        part.batch_select_indices(rows)
        return part

    def join(self, parts: Sequence[StateLayer], order: Tensor) -> None:
        """Fill with the states of ``parts``: row b is row ``order[b]`` of their concatenation; ``order`` [B] int64."""
        self.__dict__.update(parts[0].__dict__)
        for states, name in ((self.conv_states, "conv_states"), (self.recurrent_states, "recurrent_states")):
            states[0] = torch.cat([getattr(part, name)[0] for part in parts]).index_select(0, order)

    def put_rows(self, rows: Tensor, part: StateLayer) -> None:
        """Replace the states of ``rows`` [n] int64 by those in ``part``."""
        for states, new in ((self.conv_states, part.conv_states), (self.recurrent_states, part.recurrent_states)):
            states[0] = states[0].index_copy(0, rows, new[0])

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_rows(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda state: state[indices])

    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        for states in (self.conv_states, self.recurrent_states):
            states[0] = None if states[0] is None else function(states[0])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                f"crop({tokens_to_remove}): the recurrent state of a linear attention layer cannot forget tokens; "
                "start with a new DynamicCache, and leave out assisted generation and prompt_lookup_num_tokens"
            )


def first_attending(cache: Cache) -> StagedLayer:
    """The first layer of a staged cache with keys, which also holds the data of the whole cache."""
    return next(layer for layer in cache.layers if isinstance(layer, StagedLayer))


def _with_room(content: Tensor, columns: int) -> Tensor:
    """Allocate a buffer [B, G, >= columns, D] that starts with ``content`` [B, G, W, D]."""
    room = content.new_empty(*content.shape[:2], columns + max(LEAST_ROOM, columns // ROOM_SHARE), content.shape[-1])
    room[:, :, : content.shape[-2]] = content
    return room


def staged(
    cache: Cache | None, num_layers: int, method: PruningMethod | None, attending: Collection[int] | None = None
) -> DynamicCache:
    """Convert an empty ``cache`` to staged layers in place; create a new one for ``None``. ``attending``: the layers
    that attend, by default all.

    Raises:
        ValueError: the cache has an unsupported type (static, quantized, offloaded), or was filled by a dense model or
            by a method other than ``method``.
    """
    cache = DynamicCache() if cache is None else cache
    if type(cache) is not DynamicCache or cache.offloading:
        kind = "an offloaded cache" if isinstance(cache, DynamicCache) else f"a {type(cache).__name__}"
        raise ValueError(
            f"past_key_values is {kind}, but a pruned model keeps a different number of tokens in each layer and needs "
            "a plain DynamicCache; leave past_key_values and cache_implementation unset"
        )
    if cache.layers and all(isinstance(layer, StagedLayer | StateLayer) for layer in cache.layers):
        filled_by = first_attending(cache).filled_by
        if cache.get_seq_length() and filled_by is not method and filled_by != method:
            raise ValueError(
                f"past_key_values was filled by a model pruned by {filled_by}, but this one is pruned by {method}; "
                "start with a new DynamicCache"
            )
        return cache
    if cache.get_seq_length():
        raise ValueError(
            f"past_key_values already holds {cache.get_seq_length()} tokens of a dense model; start with an empty "
            "DynamicCache, or run this turn inside `with vtprune_train.dense(model):`"
        )
    attending = range(num_layers) if attending is None else attending
    cache.layers = [StagedLayer() if index in attending else StateLayer() for index in range(num_layers)]
    cache.layer_class_to_replicate = None
    return cache


def cache_bytes(cache: Cache) -> int:
    """Bytes of all keys, values and recurrent states, including padding but excluding preallocated space."""
    return sum(tensor.numel() * tensor.element_size() for layer in cache.layers for tensor in _stored(layer))


def _stored(layer: Any) -> list[Tensor]:
    if isinstance(layer, LinearAttentionLayer):
        return [state for states in (layer.conv_states, layer.recurrent_states) if (state := states[0]) is not None]
    return [layer.keys, layer.values] if layer.is_initialized else []


@dataclass(frozen=True)
class StageCache:
    """How a stage's packed tokens are appended to a layer's cache; computed on the host once per group of identical
    layers, then copied to the device.

    Args:
        join: [Tk] int64, indices into the concatenation of cached columns and new tokens that give the packed keys, row
            by row; ``None`` if nothing is cached.
        spread: [B * W] int64, packed-key index for each column of the new cache (padding columns repeat a token).
        padding: [B] int64, padding columns of each row; ``is_padded`` whether any is positive.
        key_lengths: number of packed keys per row; ``cu_seqlens_k`` [B + 1] int32 their cumulative offsets.
    """

    join: Tensor | None
    spread: Tensor
    padding: Tensor
    is_padded: bool
    key_lengths: tuple[int, ...]
    cu_seqlens_k: Tensor

    @classmethod
    def of(cls, new_lengths: Sequence[int], cached: Sequence[int], cached_width: int) -> StageCache:
        """Plan one layer on the host from each row's new and cached token counts. The current cache has
        ``cached_width`` columns; the new cache is as wide as its longest row."""
        lengths = np.add(new_lengths, cached).astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        columns = int(lengths.max())
        padding = columns - lengths
        spread = starts[:-1, None] + np.maximum(np.arange(columns)[None, :] - padding[:, None], 0)
        join = None
        if cached_width:
            new_starts = len(cached) * cached_width + np.concatenate([[0], np.cumsum(new_lengths)])
            parts = []
            for row, (old, new) in enumerate(zip(cached, new_lengths, strict=True)):
                parts.append(np.arange((row + 1) * cached_width - old, (row + 1) * cached_width))
                parts.append(np.arange(new_starts[row], new_starts[row] + new))
            join = torch.from_numpy(np.concatenate(parts))
        return cls(
            join=join,
            spread=torch.from_numpy(spread.ravel()),
            padding=torch.from_numpy(padding),
            is_padded=bool(padding.any()),
            key_lengths=tuple(lengths.tolist()),
            cu_seqlens_k=torch.from_numpy(starts.astype(np.int32)),
        )

    def new_keys(self, new_lengths: Sequence[int]) -> Tensor:
        """[T] int64, index of each new token within the packed keys."""
        ends = np.cumsum(self.key_lengths)
        parts = [np.arange(end - new, end) for end, new in zip(ends, new_lengths, strict=True)]
        return to_device(np.concatenate(parts), self.spread.device)  # type: ignore[no-any-return]


class PackedCache:
    """Passed to decoder layers as ``past_key_values`` for packed batches: stores keys and values padded per row and
    returns them packed, cached tokens first."""

    def __init__(self, cache: DynamicCache):
        self.cache = cache
        self.stage: StageCache | None = None
        self.withheld = False  # this layer writes its cache itself, with the kept keys only

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """keys and values [1, G, T, D] of the new stream -> [1, G, Tk, D] of cached and new tokens."""
        assert self.stage is not None, "the stage must be set before its layers run"
        layer = self.cache.layers[layer_idx]
        keys = self._join(keys, layer.keys)
        values = self._join(values, layer.values)
        if not self.withheld:
            layer.fill(self._spread(keys), self._spread(values), self.stage.padding, self.stage.is_padded)
        self.withheld = False
        return keys, values

    def fill_kept(
        self, layer_idx: int, keys_TGD: Tensor, values_TGD: Tensor, kept_GT: Tensor, left_out: np.ndarray
    ) -> None:
        """Store only the kept keys, the same number per row in every head; the rest are freed with the batch.

        Args:
            layer_idx: index of the layer.
            keys_TGD: [Tk, G, D] as :meth:`update` returned them, likewise ``values_TGD``.
            kept_GT: [G, Tk] bool.
            left_out: [B] int64, number of dropped keys of each row.
        """
        assert self.stage is not None
        lengths = np.array(self.stage.key_lengths) - left_out
        stored: StageCache = to_device(StageCache.of(lengths.tolist(), [0] * len(lengths), 0), keys_TGD.device)
        in_order = torch.sort(kept_GT.to(torch.uint8), dim=1, descending=True, stable=True).indices
        columns = in_order[:, stored.spread].unflatten(1, (len(lengths), -1)).transpose(0, 1)  # [B, G, W]
        heads = torch.arange(kept_GT.shape[0], device=columns.device)[:, None]
        layer: StagedLayer = self.cache.layers[layer_idx]  # type: ignore[assignment]
        layer.fill(keys_TGD[columns, heads], values_TGD[columns, heads], stored.padding, stored.is_padded)
        layer.compacted = True

    def joined_keys(self, keys_TGD: Tensor, layer_idx: int) -> Tensor:
        """[Tk, G, D]: cached and new keys of the layer, row by row."""
        cached = self.cache.layers[layer_idx].keys
        return self._join(keys_TGD.transpose(0, 1).unsqueeze(0), cached).squeeze(0).transpose(0, 1)

    def _join(self, new: Tensor, cached: Tensor | None) -> Tensor:
        assert self.stage is not None
        if self.stage.join is None or cached is None:
            return new
        flat = cached.transpose(0, 1).flatten(1, 2).unsqueeze(0)  # [1, G, B * W, D]
        return torch.cat([flat, new], dim=2).index_select(2, self.stage.join)

    def _spread(self, packed: Tensor) -> Tensor:
        assert self.stage is not None
        rows = len(self.stage.key_lengths)
        padded = packed.squeeze(0).index_select(1, self.stage.spread).unflatten(1, (rows, -1))  # [G, B, W, D]
        return padded.transpose(0, 1).contiguous()
