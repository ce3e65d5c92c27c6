"""Describes the machine and measures its limits: matrix products and copies."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess

import torch

from gpu_checks.common import Check

PACKAGES = (
    "torch", "triton", "transformers", "deepspeed", "datasets", "pyarrow", "liger-kernel", "flash-attn-4", "torchao",
    "numpy", "accelerate", "peft", "pydantic",
)  # fmt: skip


def env(check: Check) -> None:
    """Versions, and the GPU with its clocks."""
    installed = {name.lower() for d in importlib.metadata.distributions() if (name := d.metadata["Name"])}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}
    check.report.put("env", python=platform.python_version(), versions=versions, cores=os.cpu_count())
    if not check.on_cuda:
        return
    properties = torch.cuda.get_device_properties(check.device)
    check.report.put(
        "env",
        gpu=properties.name,
        memory_gib=properties.total_memory / 2**30,
        multiprocessors=properties.multi_processor_count,
        cuda=torch.version.cuda,
        nvcc=shutil.which("nvcc"),
        smi=subprocess.run(["nvidia-smi", "-q", "-d", "CLOCK,POWER"], capture_output=True, text=True).stdout[:1500],
    )


def peaks(check: Check) -> None:
    """TFLOP/s of a square product and of the decoder's products (tokens odd and rounded), TB/s of a copy."""
    shapes = {"8192^3": (8192, 8192, 8192)}
    for tokens in (17435, 17408, 9141, 2920):
        for name, (k, n) in {"qkvo": (4096, 4096), "up": (4096, 11008), "down": (11008, 4096)}.items():
            shapes[f"{name} T={tokens}"] = (tokens, k, n)
    if not check.on_cuda:
        shapes = {"64^3": (64, 64, 64)}
    rates = {name: _product_rates(check, *shape) for name, shape in shapes.items()}
    check.report.put("peaks", tflops=rates, matmul_tflops=max(rate["forward"] for rate in rates.values()))
    source = torch.ones(2**30 if check.on_cuda else 2**10, device=check.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = check.timed(lambda: target.copy_(source), 5, 2)["ms"]
    check.report.put("peaks", copy_tb_s=2 * source.nbytes / copy / 1e9)
    if check.on_cuda:
        host = torch.empty(64 * 2**20, dtype=torch.uint8, pin_memory=True)
        to_device = check.timed(lambda: host.to(check.device, non_blocking=True), 5, 2)["ms"]
        check.report.put("peaks", host_to_device_gb_s=host.nbytes / to_device / 1e6)


def _product_rates(check: Check, m: int, k: int, n: int) -> dict[str, float]:
    """TFLOP/s of [m, k] x [k, n], and of the weight's gradient."""
    a, b, g = (torch.randn(s, device=check.device, dtype=torch.bfloat16) for s in ((m, k), (n, k), (m, n)))
    forward = check.timed(lambda: a @ b.t(), 5, 2)["ms"]
    weight = check.timed(lambda: g.t() @ a, 5, 2)["ms"]
    return {"forward": 2 * m * k * n / forward / 1e9, "weight_grad": 2 * m * k * n / weight / 1e9}
