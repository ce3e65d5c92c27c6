"""Attention backends for packed batches, and how ``auto`` selects one.

Every backend is registered with ``transformers.AttentionInterface`` under ``packed_NAME``. Decoder layers pass it one
extra keyword, ``packing`` (:class:`Packing`), which holds everything that changes between batches.

A backend is a function with the signature of :func:`varlen_sdpa`. A function outside the package is selected by its
path (:func:`user_function`).

Shape suffixes: T tokens in the stream, H query heads, G key-value heads, D head size.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
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
OWNED = "_vtprune_owned"  # attribute set on a pruned model's attention modules, linear attention included
OTHERWISE = "_otherwise_"  # separator in the attention name, before the dense implementation

# Head sizes supported by each kernel (forward and backward), by major compute capability. Sources:
# flash_attn/cute/interface.py of flash-attn-4 4.0.0b36 (no backward before 9.0; 12.x has too little shared memory for
# large heads); PyTorch's copy of FlashAttention 2's flash_api.cpp, which requires multiples of 8 (the flash-attn
# package pads to them); for FlashAttention 3, its README.
_TO_128, _TO_256 = frozenset(range(8, 129, 8)), frozenset(range(8, 257, 8))
HEAD_SIZES: dict[str, dict[int, frozenset[int]]] = {
    "flash_attention_4": {9: _TO_256, 10: _TO_128 | {256}, 11: _TO_128 | {256}, 12: _TO_128},
    "flash_attention_3": {9: _TO_256},
    "flash_attention_2": dict.fromkeys(range(8, 13), frozenset(range(1, 257))),
    "varlen_torch": dict.fromkeys(range(8, 13), _TO_256),
}

# Pass grouped K/V to varlen_attn directly; the kernel supports GQA in forward and backward. PyTorch 2.13 needs an
# explicit keyword; 2.11 has neither the keyword nor the check.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

# Segments up to this length share one SDPA call with others of similar length: the overhead of a call exceeds the cost
# of a few padded rows.
SHARED_CALL_LENGTH = 512
SHARED_CALL_PADDING = 1.125

# Keywords passed unchanged to transformers' flash path.
FLASH_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass(eq=False)  # PyTorch 2.11 would put guards on every field of a frozen dataclass
class Packing:
    """Per-layer attention inputs other than queries, keys and values.

    Bundled in one object because torch.compile specializes on plain Python arguments: passing lengths as keywords would
    trigger a recompile for every number of segments.

    Args:
        lengths: keywords of the Hugging Face flash path (``cu_seq_lens_q``, ``max_length_q``, ...), and
            ``segment_lengths`` (host copy of the lengths) and ``key_lengths`` (if cached keys precede the new ones).
        probe: called with the rotated queries and keys; this is how a method reads them at no extra cost.
        key_choice: called with queries, keys, values and output; returns the output after recomputing the rows that
            must not see all keys.
        of_stage: values that layers compute from the lengths, once for all layers of a stage.
    """

    lengths: dict[str, Any]
    probe: Callable[[Tensor, Tensor], None] | None = None
    key_choice: Callable[..., Tensor] | None = None
    of_stage: dict[Any, Any] = field(default_factory=dict)


def unavailable_because(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int | None = None
) -> str | None:
    """Why ``backend`` cannot run on ``device`` in ``dtype`` with heads of ``head_dim`` values, or ``None`` if it can.

    Raises:
        ValueError: unknown backend.
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
        return f"needs float16 or bfloat16, not {dtype}"
    if backend in FLASH_INSTALLED and not FLASH_INSTALLED[backend]():
        return "needs its flash-attn package"
    capability = torch.cuda.get_device_capability(device)
    by_major, gpu = HEAD_SIZES[backend], ".".join(map(str, capability))
    if capability[0] not in by_major:
        first, last = min(by_major), max(by_major)
        needed = f"{first}.x" if first == last else f"{first}.x to {last}.x"
        return f"needs compute capability {needed}, this GPU has {gpu}"
    if head_dim is not None and head_dim not in by_major[capability[0]]:
        return f"has no kernel for head_dim={head_dim} at this GPU's compute capability {gpu}"
    return None


def choose_backend(requested: str, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str:
    """Resolve ``auto`` to the first backend that works on ``device`` in ``dtype``, and log which one and why.

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
    if device.type == "cpu":
        passed_over = "no GPU"
    log.info("attention: %s%s", chosen, f" ({passed_over})" if passed_over else "")
    return chosen


def user_function(path: str) -> Callable[..., Tensor]:
    """The attention function at ``path``, used in every decoder layer of a packed batch. A vision tower with packed
    images uses one of the package's backends instead.

    It is called as ``function(q_THD, k_TGD, v_TGD, *, segment_lengths, cu_seq_lens_q, cu_seq_lens_k, max_length_q,
    max_length_k, scaling, **kwargs)`` and returns [T, H, D]. Attention is causal within each segment; query heads share
    key-value heads where H > G. The function must accept further keywords; those that change the result are
    ``dropout``, ``sliding_window`` and ``key_lengths``, with the same meaning as in :func:`varlen_sdpa`.

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
    """Causal attention within each segment with PyTorch SDPA; the reference implementation, available on every device.

    Long segments use one call each. Short segments of similar length are padded on the right and share a call: under a
    causal mask real tokens never see the padding, so no mask is needed and the result is the same. Without ``causal``
    (every token sees its whole segment) only segments of equal length share a call.

    With ``key_lengths``, each segment's keys start with cached keys, which are visible to all its queries.

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
        mask = None  # also if the window covers the whole segment
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
    """``shapes`` (segments, width) of each call; ``gather`` [padded T] maps each slot of the concatenated calls to a
    row of the packed batch and ``scatter`` [T] maps back; both ``None`` if no padding or reordering is needed."""

    shapes: tuple[tuple[int, int], ...]
    gather: Tensor | None
    scatter: Tensor | None


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # disable inference mode: tensors cached during evaluation are reused in training
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
    """One call per segment, with the queries aligned to the end of its keys."""
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
    """[L, keys] bool causal mask for ``rows`` [L], which are indices into the keys."""
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
        ValueError: attention dropout is non-zero; the kernel does not support it.
    """
    if dropout:
        raise ValueError(
            "attention=varlen_torch does not support attention dropout; set attention_dropout to 0 or use flash"
        )
    window = (-1 if sliding_window is None else sliding_window - 1, 0 if causal else -1)
    return varlen_attn(  # type: ignore[return-value]
        q_THD, k_TGD, v_TGD, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k,
        scale=scaling, window_size=window, **_GROUPED if q_THD.shape[1] != k_TGD.shape[1] else {},
    )  # fmt: skip


def _flash(implementation: str) -> Callable[..., Tensor]:
    """transformers' flash-attention path, given the sequence lengths so that it does not have to derive them."""

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


def in_mixed_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast queries and keys, which the rotary embedding leaves in float32 under autocast, for kernels that autocast
    does not know."""
    dtype = autocast_dtype(tensors[0].device)
    return tensors if dtype is None else tuple(tensor.to(dtype) for tensor in tensors)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast computes on ``device``; ``None`` if it is off."""
    kind = device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if enabled else None


def attention_name(backend: str, dense: str = "sdpa") -> str:
    """Build the attention name registered for a pruned model's decoder. It encodes ``backend``, used for packed
    batches, and ``dense``, the original implementation, used inside ``vtprune_train.dense`` (per thread, including
    recomputation). ``dense`` may itself be such a name."""
    dense = dense_implementation(dense)
    function = user_function(backend) if is_path(backend) else FUNCTIONS[backend]
    # Only the last part of a path: transformers looks for names with a slash on the hub.
    name = PREFIX + Path(backend).name + ("" if dense == "sdpa" else OTHERWISE + dense)
    if name not in AttentionInterface._global_mapping or is_path(backend):
        _register(name, function, dense)
    return name


def dense_implementation(name: str | None) -> str:
    """Extract the dense implementation from a name built by :func:`attention_name`; return any other name unchanged."""
    if not str(name).startswith(PREFIX):
        return str(name or "eager")
    return str(name).partition(OTHERWISE)[2] or "sdpa"


def dense_function(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """Return the original transformers attention function for a module."""
    if implementation in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[implementation]  # type: ignore[no-any-return]
    home = next(cls.__module__ for cls in type(module).__mro__ if cls.__module__.startswith("transformers.models."))
    return sys.modules[home].eager_attention_forward  # type: ignore[no-any-return]


def _register(name: str, function: Callable[..., Tensor], dense: str) -> None:
    @torch.compiler.disable  # graph break: compiled layers call this eagerly
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
        """Packed: query [1, H, T, D], key and value [1, G, Tk, D] -> [1, T, H, D]. Decoding steps have no lengths and
        use transformers' own SDPA: query [B, H, 1, D], key and value [B, G, W, D] -> [B, 1, H, D]. All other calls come
        from the dense model."""
        if staged_decoding:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        if packing is None:
            if OWNED not in module.__dict__:
                raise ValueError(
                    f"attention {name!r} is only for pruned models, and this one is not pruned: its config was copied "
                    "from a pruned model; call prune(model), load it with attn_implementation='sdpa', or unprune "
                    "before copying"
                )
            return dense_function(module, dense)(module, query, key, value, attention_mask, **kwargs)
        assert attention_mask is None, "packed batches do not take an attention mask"
        q_THD, k_TGD, v_TGD = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        if packing.probe is not None:
            packing.probe(q_THD, k_TGD)
        kwargs |= packing.lengths
        out_THD = function(*in_mixed_precision(q_THD, k_TGD, v_TGD), **kwargs)
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
