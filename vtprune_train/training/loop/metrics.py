"""Peak FLOP/s of devices."""

from __future__ import annotations

import re

import torch

# Dense bf16 tensor throughput in FLOP/s, from the vendors' data sheets.
PEAK_FLOPS = {
    "GH200": 989e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "B200": 2250e12,
    "GB200": 2500e12,
}
# Words that mark a variant of a card: its peak differs from that of the card without the word.
VARIANTS = {"D", "Laptop", "MIG", "NVL", "Ti"}


def device_peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of a device, or ``None`` if unknown."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(name: str) -> float | None:
    """Peak of the card whose words all occur in the driver's ``name``, such as ``NVIDIA A100-SXM4-80GB``; if several
    cards match, the one with the longest name."""
    words = set(re.split(r"[\s-]+", name))
    card = max((card for card in PEAK_FLOPS if words.issuperset(card.split())), key=len, default="")
    return None if (words & VARIANTS).difference(card.split()) else PEAK_FLOPS.get(card)
