"""Attention over a packed stream: the backends, and which one ``auto`` takes.

Every backend is registered with ``transformers.AttentionInterface`` under ``packed_NAME`` and takes the keywords that
the Hugging Face flash path takes (``cu_seq_lens_q``, ``max_length_q``, ...), plus two of ours: ``segment_lengths``, the
host's copy of the lengths, and ``probe``, called with the rotated queries and keys of the layer (which is how a
method reads them at no extra cost).

Shape suffixes: T tokens in the stream, H query heads, G key-value heads, D head size.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_flash_attention_utils import _flash_attention_forward

log = logging.getLogger(__name__)

FLASH = ("flash_attention_4", "flash_attention_3", "flash_attention_2")
FLASH_PACKAGES = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn.cute",
}
BACKENDS = (*FLASH, "varlen_torch", "varlen_sdpa")
PREFIX = "packed_"

# Segments up to this length share one SDPA call with others of similar length: below it the call costs more than the
# few padded rows.
SHARED_CALL_LENGTH = 512
SHARED_CALL_PADDING = 1.125


def unavailable_because(backend: str) -> str | None:
    """Why ``backend`` cannot run here, or ``None`` if it can.

    Raises:
        ValueError: no such backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention={backend!r} is unknown; use auto or one of: {', '.join(BACKENDS)}")
    if backend == "varlen_sdpa":
        return None
    if not torch.cuda.is_available():
        return "needs CUDA"
    package = FLASH_PACKAGES.get(backend)
    if package is None:
        found = importlib.util.find_spec("torch.nn.attention.varlen") is not None
        return None if found else "needs torch.nn.attention.varlen (PyTorch >= 2.10)"
    if importlib.util.find_spec(package.partition(".")[0]) is None or importlib.util.find_spec(package) is None:
        return f"needs the package {package}"
    return None


def choose_backend(requested: str = "auto") -> str:
    """Resolve ``auto`` to the first backend that works here, logging which and why.

    Raises:
        ValueError: the backend is unknown or cannot run here.
    """
    if requested != "auto":
        if reason := unavailable_because(requested):
            raise ValueError(f"attention={requested!r} cannot run here: it {reason}; use attention=auto")
        return requested
    reasons = {backend: unavailable_because(backend) for backend in BACKENDS}
    chosen = next(backend for backend, reason in reasons.items() if reason is None)
    passed_over = "; ".join(f"{backend} {reason}" for backend, reason in reasons.items() if reason)
    log.info("attention: %s%s", chosen, f" ({passed_over})" if passed_over else "")
    return chosen


def varlen_sdpa(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    *,
    segment_lengths: tuple[int, ...],
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> Tensor:
    """Causal attention within each segment by PyTorch's SDPA; the reference on every device.

    Long segments take one call each. Short ones of similar length share a call, padded on the right: under a causal
    mask no real token sees what lies to its right, so no mask is needed and the result is the same.

    Returns:
        [T, H, D] in the dtype of ``q_THD``.
    """
    starts = [0]
    for length in segment_lengths:
        starts.append(starts[-1] + length)
    parts: list[Tensor | None] = [None] * len(segment_lengths)
    for group in _similar_lengths(segment_lengths):
        width = segment_lengths[group[0]]

        def rows(x: Tensor, group: list[int] = group, width: int = width) -> Tensor:  # [B, H, width, D]
            slices = [x[starts[i] : starts[i + 1]] for i in group]
            if len(slices) == 1:
                return slices[0].transpose(0, 1).unsqueeze(0)
            padded = [s if len(s) == width else F.pad(s, (0, 0, 0, 0, 0, width - len(s))) for s in slices]
            return torch.stack(padded).transpose(1, 2)

        mask = None
        if sliding_window is not None and sliding_window < width:
            index = torch.arange(width, device=q_THD.device)
            distance = index[:, None] - index[None, :]
            mask = (distance >= 0) & (distance < sliding_window)
        out = F.scaled_dot_product_attention(
            rows(q_THD),
            rows(k_TGD),
            rows(v_TGD),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=q_THD.shape[1] != k_TGD.shape[1],
        ).transpose(1, 2)  # [B, width, H, D]
        for row, index_in_stream in enumerate(group):
            parts[index_in_stream] = out[row, : segment_lengths[index_in_stream]]
    return torch.cat([part for part in parts if part is not None])


def _similar_lengths(lengths: tuple[int, ...]) -> list[list[int]]:
    """Segments that share a call, longest first in each group."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for index in order:
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and longest <= SHARED_CALL_LENGTH and longest <= SHARED_CALL_PADDING * lengths[index] + 4:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def varlen_torch(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> Tensor:
    """Causal attention within each segment by ``torch.nn.attention.varlen`` (CUDA, half precision).

    Returns:
        [T, H, D].

    Raises:
        ValueError: attention dropout was asked for, which the kernel does not have.
    """
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise ValueError("attention=varlen_torch has no attention dropout; set attention_dropout to 0 or use flash")
    groups = q_THD.shape[1] // k_TGD.shape[1]
    if groups > 1:
        k_TGD, v_TGD = (x.repeat_interleave(groups, dim=1) for x in (k_TGD, v_TGD))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    return varlen_attn(
        q_THD, k_TGD, v_TGD, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, window_size=window
    )


def _flash(implementation: str) -> Callable[..., Tensor]:
    """transformers' own flash path, with the lengths it would otherwise search for."""

    def run(
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        *,
        cu_seq_lens_q: Tensor,
        max_length_q: int,
        scaling: float,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        **_: Any,
    ) -> Tensor:
        out = _flash_attention_forward(
            q_THD.unsqueeze(0),
            k_TGD.unsqueeze(0),
            v_TGD.unsqueeze(0),
            None,
            query_length=q_THD.shape[0],
            is_causal=True,
            dropout=dropout,
            softmax_scale=scaling,
            sliding_window=sliding_window,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_q,
            max_length_q=max_length_q,
            max_length_k=max_length_q,
            attn_implementation=implementation,
        )
        return out.squeeze(0)

    return run


def _register(backend: str, function: Callable[..., Tensor]) -> None:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        probe: Callable[[Tensor, Tensor], None] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]."""
        assert attention_mask is None, "a packed stream has no attention mask"
        q_THD, k_TGD, v_TGD = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        if probe is not None:
            probe(q_THD, k_TGD)
        return function(q_THD, k_TGD, v_TGD, **kwargs).unsqueeze(0), None

    AttentionInterface.register(PREFIX + backend, attention)


for _name in FLASH:
    _register(_name, _flash(_name))
_register("varlen_torch", varlen_torch)
_register("varlen_sdpa", varlen_sdpa)
