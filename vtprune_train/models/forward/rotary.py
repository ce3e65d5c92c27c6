"""Rotary frequencies in float32, whatever dtype the weights are cast to."""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor

from vtprune_train.models import HFModule

log = logging.getLogger(__name__)


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
