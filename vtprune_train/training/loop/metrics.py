"""What a step costs, measured: peaks of devices."""

from __future__ import annotations

import torch

# Dense bf16 tensor throughput in FLOP/s, from the vendors' data sheets.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "B200": 2250e12,
}


def device_peak_flops(device: torch.device) -> float | None:
    """Peak of one device in FLOP/s (bf16), or ``None`` where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
