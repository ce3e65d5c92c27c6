"""The staged key-value cache: every layer holds the tokens of its stage, each row's padded on the left.

A ``transformers.DynamicCache`` whose layers are :class:`StagedLayer`, so ``generate``, beam search and everything else
that handles a cache goes on doing so. The first layer always holds all tokens; its length is the one position counter.

Shape suffixes: B rows, G key-value heads, W columns of a layer's cache, D head size, T tokens of the packed stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


@dataclass(frozen=True)
class Told:
    """A conversation so far, before any layer, in the caller's columns: ``embeds`` [B, W, C], and ``image`` [B, W]
    int64, which of its row's images each column belongs to, or that it is text or padding."""

    TEXT: ClassVar[int] = -1
    PADDING: ClassVar[int] = -2

    embeds: Tensor
    image: Tensor

    def and_then(self, embeds: Tensor, image: Tensor) -> Told:
        """With the next columns."""
        return Told(torch.cat([self.embeds, embeds], dim=1), torch.cat([self.image, image], dim=1))


class StagedLayer(DynamicLayer):
    """One layer's keys and values [B, G, W, D]; the first ``padding[b]`` columns of row b are not tokens.

    ``padding`` [B] int64; ``is_padded`` is the host's word for whether any of it is positive. ``ahead`` [B] int64 is
    how far a row's next position lies ahead of its number of tokens, where an image advances positions by less (or
    more) than its tokens; ``None`` where positions count tokens. ``told``, on the first layer only, is what
    ``multi_turn: keep_dense`` runs again in a later turn.
    """

    def __init__(self) -> None:
        super().__init__()
        self.padding: Tensor | None = None
        self.is_padded = False
        self.ahead: Tensor | None = None
        self.told: Told | None = None

    def fill(self, keys: Tensor, values: Tensor, padding: Tensor, is_padded: bool) -> None:
        """Replace the content: keys and values [B, G, W, D], ``padding`` [B]."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys, self.values, self.padding, self.is_padded = keys, values, padding, is_padded

    def reset(self) -> None:
        super().reset()
        self.padding, self.is_padded, self.ahead, self.told = None, False, None, None

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
        if self.told is not None:
            self.told = Told(function(self.told.embeds), function(self.told.image))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): a staged layer is cut by a negative number, tokens to remove")
        super().crop(tokens_to_remove)
        if self.told is not None and tokens_to_remove < 0:
            self.told = Told(self.told.embeds[:, :tokens_to_remove], self.told.image[:, :tokens_to_remove])

    def next_positions(self) -> Tensor:
        """[B] int64, the position of each row's next token."""
        return self.num_tokens() if self.ahead is None else self.num_tokens() + self.ahead

    def num_tokens(self) -> Tensor:
        """[B] int64, the tokens each row holds."""
        assert self.padding is not None, "an empty layer has no rows"
        return self.keys.shape[-2] - self.padding


def staged(cache: Cache | None, num_layers: int) -> DynamicCache:
    """``cache`` with staged layers, changed in place while it is empty; a new one for ``None``.

    Raises:
        ValueError: the cache is of another kind (static, quantized, offloaded), or a dense model filled it.
    """
    if cache is None:
        return _with_staged_layers(DynamicCache(), num_layers)
    if type(cache) is not DynamicCache or cache.offloading:
        kind = "an offloaded cache" if isinstance(cache, DynamicCache) else f"a {type(cache).__name__}"
        raise ValueError(
            f"past_key_values is {kind}, but a pruned model keeps another length in every layer and needs a plain "
            "DynamicCache; leave past_key_values and cache_implementation unset"
        )
    if is_staged(cache):
        return cache
    if cache.get_seq_length():
        raise ValueError(
            f"past_key_values holds {cache.get_seq_length()} tokens of a model that was not pruned; start with an "
            "empty DynamicCache, or run this turn inside `with vtprune_train.dense(model):`"
        )
    return _with_staged_layers(cache, num_layers)


def _with_staged_layers(cache: DynamicCache, num_layers: int) -> DynamicCache:
    cache.layers = [StagedLayer() for _ in range(num_layers)]
    cache.layer_class_to_replicate = None
    return cache


def is_staged(cache: Cache) -> bool:
    """Whether a pruned model has filled (or is about to fill) this cache."""
    return len(cache.layers) > 0 and all(isinstance(layer, StagedLayer) for layer in cache.layers)


def cache_bytes(cache: Cache) -> int:
    """Bytes of all keys and values, padding columns included."""
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in cache.layers
        if layer.is_initialized
        for tensor in (layer.keys, layer.values)
    )


@dataclass(frozen=True)
class StageCache:
    """How the packed tokens of a stage join the cache of its layers; laid out on the host once per stage.

    Args:
        join: [Tk] int64, rows of [the cached columns of all rows; the new stream] that make the packed keys, row after
            row; ``None`` where nothing is cached, so that the new stream is all.
        spread: [B * W] int64, the packed key at each column of the layer's new cache (padding repeats a token).
        padding: [B] int64, padding columns of each row; ``is_padded`` whether any is positive.
        key_lengths: packed keys of each row; ``cu_seqlens_k`` [B + 1] int32 where each row's begin.
    """

    join: Tensor | None
    spread: Tensor
    padding: Tensor
    is_padded: bool
    key_lengths: tuple[int, ...]
    cu_seqlens_k: Tensor

    @classmethod
    def of(
        cls, new_lengths: Sequence[int], cached: Sequence[int], cached_width: int, width: int | None, device: Any
    ) -> StageCache:
        """Plan one stage.

        Args:
            new_lengths: new tokens of each row in this stage.
            cached: tokens of each row in the layers' cache.
            cached_width: columns of that cache.
            width: columns of the new cache; ``None`` for as few as the longest row needs.
            device: where the index tensors go.
        """
        lengths = np.add(new_lengths, cached).astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        columns = int(lengths.max()) if width is None else width
        padding = columns - lengths
        spread = starts[:-1, None] + np.maximum(np.arange(columns)[None, :] - padding[:, None], 0)
        join = None
        if cached_width:
            new_starts = len(cached) * cached_width + np.concatenate([[0], np.cumsum(new_lengths)])
            parts = []
            for row, (old, new) in enumerate(zip(cached, new_lengths, strict=True)):
                parts.append(np.arange((row + 1) * cached_width - old, (row + 1) * cached_width))
                parts.append(np.arange(new_starts[row], new_starts[row] + new))
            join = torch.from_numpy(np.concatenate(parts)).to(device)
        return cls(
            join=join,
            spread=torch.from_numpy(spread.ravel()).to(device),
            padding=torch.from_numpy(padding).to(device),
            is_padded=bool(padding.any()),
            key_lengths=tuple(lengths.tolist()),
            cu_seqlens_k=torch.from_numpy(starts.astype(np.int32)).to(device),
        )


class PackedCache:
    """Stands where a decoder layer expects ``past_key_values`` while a packed stream runs: stores each row's keys and
    values padded, and hands back the packed ones, cached tokens first."""

    def __init__(self, cache: DynamicCache):
        self.cache = cache
        self.stage: StageCache | None = None

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """keys and values [1, G, T, D] of the new stream -> [1, G, Tk, D] of cached and new tokens."""
        assert self.stage is not None, "the decoder loop sets the stage before its layers run"
        layer = self.cache.layers[layer_idx]
        keys = self._join(keys, layer.keys)
        values = self._join(values, layer.values)
        layer.fill(self._spread(keys), self._spread(values), self.stage.padding, self.stage.is_padded)
        return keys, values

    def joined_keys(self, keys_TGD: Tensor, layer_idx: int) -> Tensor:
        """[Tk, G, D]: the layer's cached keys and the new stream's, row after row."""
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
