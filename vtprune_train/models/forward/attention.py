"""Attention over a packed stream: the backends, and which one ``auto`` takes.

Every backend is registered with ``transformers.AttentionInterface`` under ``packed_NAME``. A decoder layer hands it one
keyword of ours, ``packing``, with everything that changes from batch to batch (:class:`Packing`).

A backend is a function with the signature of :func:`varlen_sdpa`. A function outside the package is named by its path
(:func:`user_function`).

Shape suffixes: T tokens in the stream, H query heads, G key-value heads, D head size.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from vtprune_train.core.backends import BACKENDS, FLASH
from vtprune_train.core.stream import to_device
from vtprune_train.core.user_code import is_path, load

log = logging.getLogger(__name__)

FLASH_INSTALLED = {
    "flash_attention_2": is_flash_attn_2_available,
    "flash_attention_3": is_flash_attn_3_available,
    "flash_attention_4": is_flash_attn_4_available,
}
PREFIX = "packed_"
OWNED = "_vtprune_owned"  # on the attention modules of a pruned model
OTHERWISE = "_otherwise_"  # in a name: before the implementation that the dense model has

# The head sizes that each kernel takes, forward and backward, by the major number of the GPU's compute capability.
# Sources: flash_attn/cute/interface.py of flash-attn-4 4.0.0b36 (no backward before 9.0; 12.x has too little shared
# memory for large heads); PyTorch's copy of FlashAttention 2's flash_api.cpp, which takes multiples of 8, where the
# package's Python interface pads to them; for FlashAttention 3, its README.
_TO_128, _TO_256 = frozenset(range(8, 129, 8)), frozenset(range(8, 257, 8))
HEAD_SIZES: dict[str, dict[int, frozenset[int]]] = {
    "flash_attention_4": {9: _TO_256, 10: _TO_128 | {256}, 11: _TO_128 | {256}, 12: _TO_128},
    "flash_attention_3": {9: _TO_256},
    "flash_attention_2": dict.fromkeys(range(8, 13), frozenset(range(1, 257))),
    "varlen_torch": dict.fromkeys(range(8, 13), _TO_256),
}

# Grouped keys and values go to varlen_attn as they are: the kernel takes them, forward and backward. PyTorch 2.13 wants
# to be told; 2.11 has neither the keyword nor a check.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

# Segments up to this length share one SDPA call with others of similar length: below it the call costs more than the
# few padded rows.
SHARED_CALL_LENGTH = 512
SHARED_CALL_PADDING = 1.125

# Keywords that transformers' flash path takes as they are.
FLASH_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass(frozen=True)
class Packing:
    """What the attention of one layer needs beside queries, keys and values.

    One object, because a compiled layer specialises on every plain value that it is called with: lengths as keywords
    would compile it again for each number of segments.

    Args:
        lengths: keywords of the Hugging Face flash path (``cu_seq_lens_q``, ``max_length_q``, ...), and two of ours:
            ``segment_lengths``, the host's copy of the lengths, and ``key_lengths``, where keys begin with cached ones.
        probe: called with the rotated queries and keys; this is how a method reads them at no extra cost.
        key_choice: called with queries, keys, values and the output, which it returns with those rows computed again
            that may not see all keys.
    """

    lengths: dict[str, Any]
    probe: Callable[[Tensor, Tensor], None] | None = None
    key_choice: Callable[..., Tensor] | None = None


def unavailable_because(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int | None = None
) -> str | None:
    """Why ``backend`` cannot run on ``device`` in ``dtype`` with heads of ``head_dim`` values, or ``None`` if it can.

    Raises:
        ValueError: no such backend.
    """
    if backend == "varlen_sdpa" or is_path(backend):
        return None
    if backend not in BACKENDS:
        raise ValueError(
            f"attention={backend!r} is unknown; use auto, path/to/file.py:function, or one of: {', '.join(BACKENDS)}"
        )
    if device.type != "cuda":
        return "needs CUDA"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"needs half precision, not {dtype}"
    if backend in FLASH_INSTALLED and not FLASH_INSTALLED[backend]():
        return "needs its flash-attn package"
    capability = torch.cuda.get_device_capability(device)
    by_major, gpu = HEAD_SIZES[backend], ".".join(map(str, capability))
    if capability[0] not in by_major:
        first, last = min(by_major), max(by_major)
        needed = f"{first}.x" if first == last else f"{first}.x to {last}.x"
        return f"needs compute capability {needed}, this GPU has {gpu}"
    if head_dim is not None and head_dim not in by_major[capability[0]]:
        return f"has no kernel for heads of {head_dim} values at this GPU's compute capability {gpu}"
    return None


def choose_backend(requested: str, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str:
    """Resolve ``auto`` to the first backend that works on ``device`` in ``dtype``, logging which and why.

    Raises:
        ValueError: the backend is unknown or cannot run here.
    """
    if is_path(requested):
        user_function(requested)
        return requested
    if requested != "auto":
        if reason := unavailable_because(requested, device, dtype, head_dim):
            raise ValueError(f"attention={requested!r} cannot run here: it {reason}; use attention=auto")
        return requested
    reasons = {backend: unavailable_because(backend, device, dtype, head_dim) for backend in BACKENDS}
    chosen = next(backend for backend, reason in reasons.items() if reason is None)
    passed_over = "; ".join(f"{backend} {reason}" for backend, reason in reasons.items() if reason)
    log.info("attention: %s%s", chosen, f" ({passed_over})" if passed_over else "")
    return chosen


def user_function(path: str) -> Callable[..., Tensor]:
    """The attention function at ``path``, used in every decoder layer of a packed batch. A vision tower that packs its
    images takes a backend of the package.

    It is called as ``function(q_THD, k_TGD, v_TGD, *, segment_lengths, cu_seq_lens_q, cu_seq_lens_k, max_length_q,
    max_length_k, scaling, **kwargs)`` and returns [T, H, D]. Attention is causal within each segment; query heads share
    key-value heads where H > G. The function must accept further keywords; those that change the result are
    ``dropout``, ``sliding_window`` and ``key_lengths``, with the meaning that they have in :func:`varlen_sdpa`.

    Raises:
        ValueError: see :func:`vtprune_train.core.user_code.load`; or it is not a function that takes these arguments.
    """
    function = load(path, "attention")
    keywords = dict.fromkeys(("segment_lengths", "scaling", *FLASH_LENGTHS, "dropout", "sliding_window", "key_lengths"))
    try:
        inspect.signature(function).bind("q_THD", "k_TGD", "v_TGD", **keywords, another_keyword=None)
    except TypeError as error:
        raise ValueError(
            f"attention={path!r} cannot be called as an attention function ({error}); define it as "
            "def name(q_THD, k_TGD, v_TGD, *, segment_lengths, scaling, **kwargs)"
        ) from error
    return function  # type: ignore[no-any-return]


def varlen_sdpa(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    *,
    segment_lengths: tuple[int, ...],
    scaling: float,
    key_lengths: tuple[int, ...] | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    causal: bool = True,
    **_: Any,
) -> Tensor:
    """Causal attention within each segment by PyTorch's SDPA; the reference on every device.

    Long segments take one call each. Short ones of similar length share a call, padded on the right: under a causal
    mask no real token sees what lies to its right, so no mask is needed and the result is the same. Without ``causal``
    (every token sees its whole segment) segments of equal length share a call.

    With ``key_lengths`` a segment's keys begin with cached ones, which all its queries see.

    Returns:
        [T, H, D] in the dtype of ``q_THD``.
    """
    if key_lengths is not None and key_lengths != segment_lengths:
        return _sdpa_after_cached(q_THD, k_TGD, v_TGD, segment_lengths, key_lengths, scaling, dropout, sliding_window)
    calls = _plan_calls(segment_lengths, q_THD.device, causal)
    sizes = [batch * width for batch, width in calls.shapes]
    if calls.gather is not None:
        q_THD, k_TGD, v_TGD = (x.index_select(0, calls.gather) for x in (q_THD, k_TGD, v_TGD))
    parts = []
    for shape, q, k, v in zip(calls.shapes, *(x.split(sizes) for x in (q_THD, k_TGD, v_TGD)), strict=True):
        q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in (q, k, v))  # [B, heads, width, D]
        mask = None  # also where the window holds the whole segment
        if sliding_window is not None and sliding_window < shape[1]:
            mask = causal_mask(torch.arange(shape[1], device=q.device), shape[1], sliding_window)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal and mask is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))
    joined = torch.cat(parts)
    return joined if calls.scatter is None else joined.index_select(0, calls.scatter)


@dataclass(frozen=True)
class _Calls:
    """``shapes`` (segments, width) of each call; ``gather`` [padded T] the stream's row at each place of all calls laid
    end to end, ``scatter`` [T] the way back; both ``None`` where the calls take the stream as it is."""

    shapes: tuple[tuple[int, int], ...]
    gather: Tensor | None
    scatter: Tensor | None


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is cached in an evaluation serves the next training step too
def _plan_calls(segment_lengths: tuple[int, ...], device: torch.device, causal: bool = True) -> _Calls:
    lengths = np.array(segment_lengths)
    groups: list[list[int]] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        longest, length = (lengths[groups[-1][0]] if groups else 0), lengths[index]
        similar = longest <= SHARED_CALL_LENGTH and longest <= SHARED_CALL_PADDING * length + 4
        if groups and (similar if causal else longest == length):
            groups[-1].append(index)
        else:
            groups.append([index])
    if len(groups) == len(lengths):
        return _Calls(tuple((1, length) for length in segment_lengths), None, None)
    if len(set(segment_lengths)) == 1:
        return _Calls(((len(lengths), segment_lengths[0]),), None, None)
    starts = np.cumsum([0, *segment_lengths])
    shapes = tuple((len(group), int(lengths[group[0]])) for group in groups)
    gather, scatter, offset = [], np.empty(starts[-1], dtype=np.int64), 0
    for group, (_, width) in zip(groups, shapes, strict=True):
        for index in group:
            length = lengths[index]
            gather.append(starts[index] + np.minimum(np.arange(width), length - 1))
            scatter[starts[index] : starts[index] + length] = np.arange(offset, offset + length)
            offset += width
    return _Calls(shapes, *to_device((np.concatenate(gather), scatter), device))


def _sdpa_after_cached(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    segment_lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    scaling: float,
    dropout: float,
    sliding_window: int | None,
) -> Tensor:
    """One call a segment, its queries standing at the end of its keys."""
    parts = []
    splits = (q_THD.split(segment_lengths), k_TGD.split(key_lengths), v_TGD.split(key_lengths))
    for q, k, v in zip(*splits, strict=True):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, length, D]
        rows = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)
        mask = causal_mask(rows, k.shape[2], sliding_window)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(parts)


def causal_mask(rows: Tensor, num_keys: int, sliding_window: int | None) -> Tensor:
    """[L, keys] bool: the keys that each of ``rows`` [L] sees, which are counted among them."""
    distance = rows[:, None] - torch.arange(num_keys, device=rows.device)[None, :]
    return (distance >= 0) & (distance < (sliding_window or num_keys + 1))


def varlen_torch(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    causal: bool = True,
    **_: Any,
) -> Tensor:
    """Causal attention within each segment by ``torch.nn.attention.varlen`` (CUDA, half precision); without ``causal``
    every token sees its whole segment.

    Returns:
        [T, H, D].

    Raises:
        ValueError: attention dropout was asked for, which the kernel does not have.
    """
    if dropout:
        raise ValueError("attention=varlen_torch has no attention dropout; set attention_dropout to 0 or use flash")
    window = (-1 if sliding_window is None else sliding_window - 1, 0 if causal else -1)
    return varlen_attn(  # type: ignore[return-value]
        q_THD, k_TGD, v_TGD, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k,
        scale=scaling, window_size=window, **_GROUPED if q_THD.shape[1] != k_TGD.shape[1] else {},
    )  # fmt: skip


def _flash(implementation: str) -> Callable[..., Tensor]:
    """transformers' own flash path, with the lengths it would otherwise search for."""

    def run(
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        *,
        scaling: float,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        causal: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        out = _flash_attention_forward(
            q_THD.unsqueeze(0),
            k_TGD.unsqueeze(0),
            v_TGD.unsqueeze(0),
            None,
            query_length=q_THD.shape[0],
            is_causal=causal,
            dropout=dropout,
            softmax_scale=scaling,
            sliding_window=sliding_window,
            attn_implementation=implementation,
            **{key: kwargs[key] for key in FLASH_LENGTHS},
        )
        return out.squeeze(0)

    return run


def attention_name(backend: str, dense: str = "sdpa") -> str:
    """Under which name a pruned model's decoder finds its attention: ``backend`` in a pass over a packed batch, and
    the implementation ``dense`` (or such a name, which holds one) in a pass of the dense model, within
    ``vtprune_train.dense``, in one thread or in the recomputation of its layers."""
    dense = dense_implementation(dense)
    function = user_function(backend) if is_path(backend) else FUNCTIONS[backend]
    # Only the last part of a path: transformers looks for names with a slash on the hub.
    name = PREFIX + Path(backend).name + ("" if dense == "sdpa" else OTHERWISE + dense)
    if name not in AttentionInterface._global_mapping or is_path(backend):
        _register(name, function, dense)
    return name


def dense_implementation(name: str | None) -> str:
    """The implementation of the dense model in a name that :func:`attention_name` made, or any other name itself."""
    if not str(name).startswith(PREFIX):
        return str(name or "eager")
    return str(name).partition(OTHERWISE)[2] or "sdpa"


def dense_function(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """transformers' own attention of a module."""
    if implementation in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[implementation]  # type: ignore[no-any-return]
    home = next(cls.__module__ for cls in type(module).__mro__ if cls.__module__.startswith("transformers.models."))
    return sys.modules[home].eager_attention_forward  # type: ignore[no-any-return]


def _register(name: str, function: Callable[..., Tensor], dense: str) -> None:
    @torch.compiler.disable  # a compiled layer runs its graphs around this call
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packing: Packing | None = None,
        staged_decoding: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Packed: query [1, H, T, D], key and value [1, G, Tk, D] -> [1, T, H, D]. Decoding steps carry no lengths and
        go to transformers' own SDPA: query [B, H, 1, D], key and value [B, G, W, D] -> [B, 1, H, D]. Anything else is a
        pass of the dense model."""
        if staged_decoding:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        if packing is None:
            if OWNED not in module.__dict__:
                raise ValueError(
                    f"attention {name!r} belongs to a pruned model, but this one is not: its config was copied from a "
                    "pruned model; prune(model) it too, load it with attn_implementation='sdpa', or unprune before "
                    "copying"
                )
            return dense_function(module, dense)(module, query, key, value, attention_mask, **kwargs)
        assert attention_mask is None, "a packed stream has no attention mask"
        q_THD, k_TGD, v_TGD = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        if packing.probe is not None:
            packing.probe(q_THD, k_TGD)
        kwargs |= packing.lengths
        out_THD = function(q_THD, k_TGD, v_TGD, **kwargs)
        if packing.key_choice is not None:
            out_THD = packing.key_choice(q_THD, k_TGD, v_TGD, out_THD, **kwargs)
        return out_THD.unsqueeze(0), None

    AttentionInterface.register(name, attention)
    if dense in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[dense])


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    **{name: _flash(name) for name in FLASH},
    "varlen_torch": varlen_torch,
    "varlen_sdpa": varlen_sdpa,
}
for _name in FUNCTIONS:
    attention_name(_name)
