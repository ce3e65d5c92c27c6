"""Rotary frequencies in float32, whatever dtype the weights are cast to."""

from __future__ import annotations

import copy
import logging

import torch

from vtprune_train.models import HFModule

log = logging.getLogger(__name__)


def full_frequencies(module: HFModule) -> None:
    """Compute the rotary frequencies of a decoder or vision tower again where they were cast to half precision.

    ``model.to(dtype)``, ``half()`` and ``bfloat16()`` cast all buffers; ``from_pretrained`` and DeepSpeed do not. In
    bfloat16, cosines at position 1,000 are off by up to 0.9.

    Args:
        module: one of transformers' models, with a rotary embedding among its children; changed in place.
    """
    for rotary in module.children():
        frequencies = rotary._buffers.get("inv_freq")
        if frequencies is None or frequencies.element_size() >= 4:
            continue
        full = copy.copy(rotary)  # filled before another thread sees any of it
        with torch.inference_mode(False):
            full.__dict__["_buffers"] = {name: torch.empty_like(b).float() for name, b in rotary._buffers.items()}
            module._init_weights(full)
        rotary._buffers.update(full._buffers)
        log.warning(
            "the rotary frequencies of %s were cast to %s with the weights and are float32 again: open the model in "
            "its dtype (from_pretrained(..., dtype=...)) rather than casting it",
            type(module).__name__, frequencies.dtype,
        )  # fmt: skip
