"""Rotary tables, with frequencies in float32 even if the weights are cast to another dtype."""

from __future__ import annotations

import copy
import inspect
import logging

import torch
from torch import Tensor

from vtprune_train.models import HFModule

log = logging.getLogger(__name__)


def rotary_tables(text_model: HFModule, hidden: Tensor, position_ids: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of ``position_ids``; ``longest`` is the number of tokens of the longest sequence.

    The ``dynamic`` type scales the frequencies for sequences longer than ``max_position_embeddings``. transformers
    reads the longest position from the device to decide. Here the limit is checked on the host; up to it, frequencies
    equal those of the default type.

    Raises:
        ValueError: the type is ``dynamic``, and a sequence exceeds ``max_position_embeddings``.
    """
    rotary = text_model.rotary_emb
    if getattr(rotary, "rope_type", "default") != "dynamic":
        cos, sin = rotary(hidden, position_ids=position_ids)
        return cos, sin
    if longest > rotary.original_max_seq_len:
        raise ValueError(
            f"a sequence has {longest} tokens, more than max_position_embeddings={rotary.original_max_seq_len} of the "
            "config, beyond which rope_type 'dynamic' depends on the longest sequence of a batch; shorten it, or set "
            "rope_type to yarn in config.json"
        )
    if rotary.max_seq_len_cached != rotary.original_max_seq_len:  # a dense call on a longer sequence changed them
        rotary.register_buffer("inv_freq", rotary.original_inv_freq, persistent=False)
        rotary.max_seq_len_cached = rotary.original_max_seq_len
    with torch.no_grad():
        cos, sin = inspect.unwrap(type(rotary).forward)(rotary, hidden, position_ids)
    return cos, sin


def full_frequencies(module: HFModule, *, look: bool = False) -> None:
    """Recompute rotary frequencies that were cast to half precision.

    ``model.to(dtype)``, ``half()`` and ``bfloat16()`` cast all buffers; ``from_pretrained`` and DeepSpeed do not. In
    bfloat16, cosines at position 1,000 are off by up to 0.9. With ``look``, also check float32 frequencies for a round
    trip through half precision; this synchronizes with the device."""
    for rotary in module.children():
        frequencies = rotary._buffers.get("inv_freq")
        if frequencies is None or (frequencies.element_size() >= 4 and (not look or frequencies.is_meta)):
            continue
        full = copy.copy(rotary)  # fully built before it is visible to other threads
        with torch.inference_mode(False):
            full.__dict__["_buffers"] = {name: torch.empty_like(b).float() for name, b in rotary._buffers.items()}
            module._init_weights(full)
        if frequencies.element_size() >= 4 and not _is_rounded(frequencies, full._buffers["inv_freq"]):
            continue
        rotary._buffers.update(full._buffers)
        log.warning(
            "the rotary frequencies of %s were cast to %s with the weights and have been reset to float32: load the "
            "model in its dtype (from_pretrained(..., dtype=...)) instead of casting it",
            type(module).__name__, frequencies.dtype if frequencies.element_size() < 4 else "half precision and back",
        )  # fmt: skip


def _is_rounded(frequencies: Tensor, full: Tensor) -> bool:
    """Whether float32 frequencies equal the ``full`` ones rounded to half precision."""
    if torch.equal(frequencies, full):
        return False
    return any(torch.equal(frequencies, full.to(half).float()) for half in (torch.bfloat16, torch.float16))
