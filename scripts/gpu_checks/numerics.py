"""Checks correctness: attention backends against float64, the device against the CPU, synchronization, generation."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface

import bench
import bench_generate
from gpu_checks.common import Check, device_waits, kept_differ, relative_error, worst_gradient
from vtprune_train import PyramidDrop, prune, unprune
from vtprune_train.models import HFModule
from vtprune_train.models.forward import attention as backends
from vtprune_train.pruning import METHODS, method_from_settings
from vtprune_train.pruning.base import PruningMethod

CPU = torch.device("cpu")
LENGTHS = (130, 77, 301, 1, 515)
# query heads, key-value heads, head size, sliding window
HEADS = ((8, 8, 128, None), (8, 2, 128, None), (4, 2, 64, None), (8, 2, 128, 64))
METHODS_COMPARED: dict[str, PruningMethod | None] = {
    "dense": None,
    "next_layer": PyramidDrop(layers=(2, 4, 6), rank_with="next_layer"),
    "this_layer": PyramidDrop(layers=(2, 4, 6), rank_with="this_layer"),
    "keep_positions": PyramidDrop(layers=(2, 4, 6), positions="keep"),
}


def run_backend(backend: str, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None) -> Tensor:
    """[1, T, H, D] output of a backend for packed q [1, H, T, D], k and v [1, G, T, D], called as in a decoder
    layer."""
    cu_seqlens = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)).to(q.device)
    packing = backends.Packing({
        "cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": max(lengths),
        "max_length_k": max(lengths), "segment_lengths": lengths,
    })  # fmt: skip
    out, _ = AttentionInterface()[backends.PREFIX + backend](
        torch.nn.Module(), q, k, v, None, scaling=q.shape[-1] ** -0.5, sliding_window=window, packing=packing
    )
    return out


def attention_errors(
    backend: str, device: torch.device, heads: int, groups: int, size: int, window: int | None
) -> list[float]:
    """Relative errors of output and gradients of q, k and v in bf16 against float64 on the CPU."""
    torch.manual_seed(0)
    total = sum(LENGTHS)
    # The model's projections give [1, T, H, D], seen as [1, H, T, D].
    inputs = [torch.randn(1, total, n, size, dtype=torch.bfloat16) for n in (heads, groups, groups)]
    weight = torch.randn(1, total, heads, size, dtype=torch.bfloat16)
    results = []
    for place, dtype, used in ((CPU, torch.float64, "varlen_sdpa"), (device, torch.bfloat16, backend)):
        q, k, v = (x.to(place, dtype).transpose(1, 2).requires_grad_() for x in inputs)
        out = run_backend(used, q, k, v, LENGTHS, window)
        results.append((out, *torch.autograd.grad((out.double() * weight.to(place).double()).sum(), (q, k, v))))
    reference, ours = results
    return [relative_error(a, b) for a, b in zip(ours, reference, strict=True)]


def attention(check: Check) -> None:
    """Check every available backend with grouped queries, two head sizes and a window."""
    for backend in backends.BACKENDS:
        if reason := backends.unavailable_because(backend, check.device, torch.bfloat16):
            check.report.put("attention", **{backend: reason})
            continue
        for heads, groups, size, window in HEADS:
            name = f"{backend} H={heads} G={groups} D={size} window={window}"
            with check.noting_failure("attention", name):
                errors = attention_errors(backend, check.device, heads, groups, size, window)
                check.report.put("attention", **{name: errors})


def small_geometry(layers: int = 8, dtype: torch.dtype = torch.float32, checkpointing: bool = False) -> bench.Geometry:
    """Sizes that are fast on a CPU: heads of 64, and as many drops as in the real schedule."""
    text = {**bench.llama(256, 512, layers, 4), "initializer_range": 0.06}  # so that answers do not repeat one word
    return dataclasses.replace(bench.GEOMETRIES["tiny"], text=text, dtype=dtype, checkpointing=checkpointing)


def cast_parameters(model: HFModule, dtype: torch.dtype) -> HFModule:
    """The model with parameters in ``dtype``; buffers (rotary frequencies) stay in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@dataclass
class Pass:
    """Loss, kept rows and gradients of one forward and backward pass, on the CPU."""

    loss: float
    kept: list[Tensor]
    gradients: dict[str, Tensor]


def run_pass(
    base: HFModule, samples: bench.Samples, method: PruningMethod | None, device: torch.device, dtype: torch.dtype
) -> Pass:
    """A copy of ``base`` on ``device`` in ``dtype``; TF32, which convolutions use by default, is off."""
    model = cast_parameters(copy.deepcopy(base).to(device), dtype)
    prune(model, method)
    batch = bench.pack(samples, method, model.config.text_config.num_hidden_layers, device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        out = model(batch)
        out.loss_sum.backward()
    gradients = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}
    return Pass(float(out.loss_sum.detach()), [kept.cpu() for kept in out.kept], gradients)


def compare_passes(ours: Pass, reference: Pass) -> dict[str, Any]:
    return {
        "loss": [reference.loss, ours.loss],
        "loss_error": abs(ours.loss - reference.loss) / abs(reference.loss),
        "kept_differ": kept_differ(ours.kept, reference.kept),
        "worst_gradient": worst_gradient(ours.gradients, reference.gradients),
    }


def device_against_cpu(device: torch.device) -> Iterator[tuple[str, dict[str, Any]]]:
    """Compare each method in float32 and bf16 with float32 on the CPU, and bf16 on the CPU as a reference for the
    latter."""
    geometry = small_geometry()
    base, anyres = bench.build(geometry, CPU)
    samples = bench.make_samples(geometry, anyres, 4096, CPU)
    for name, method in METHODS_COMPARED.items():
        reference = run_pass(base, samples, method, CPU, torch.float32)
        for place, dtype in ((device, torch.float32), (device, torch.bfloat16), (CPU, torch.bfloat16)):
            label = f"{name} {str(dtype).removeprefix('torch.')}" + " on the CPU" * (place is CPU)
            yield label, compare_passes(run_pass(base, samples, method, place, dtype), reference)


def tiny(check: Check) -> None:
    """The device against the CPU, and waits for the device in the forward and the backward pass."""
    for label, values in device_against_cpu(check.device):
        check.report.put("tiny", **{label: values})
    for name, method in METHODS_COMPARED.items():
        run = MethodRun(method, check.device, layers=8)
        run.forward()  # loads kernels and tunes some of them
        with device_waits(check.device) as forward:
            out = run.forward()
        with device_waits(check.device) as backward:
            out.loss_sum.backward()
        check.report.put("tiny", **{f"{name} waits": {"forward": forward, "backward": len(backward)}})


class MethodRun:
    """A small bf16 model that recomputes its layers, pruned by one method, with a batch."""

    def __init__(self, method: PruningMethod | None, device: torch.device, layers: int = 12):
        geometry = small_geometry(layers, torch.bfloat16, checkpointing=True)
        self.model, anyres = bench.build(geometry, device)
        samples = bench.make_samples(geometry, anyres, 4096, device)
        prune(self.model, method)
        self.batch = bench.pack(samples, method, layers, device)

    def forward(self) -> Any:
        return self.model(self.batch)

    def finite_gradients(self) -> bool:
        """Whether every gradient is finite; there must be some."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return bool(gradients) and all(bool(gradient.isfinite().all()) for gradient in gradients)


def methods(check: Check) -> None:
    """Run forward and backward of every method on the device, and record where its forward pass waits."""
    for name in METHODS:
        with check.noting_failure("methods", name):
            run = MethodRun(method_from_settings({"method": name}), check.device)
            with device_waits(check.device) as waits:
                out = run.forward()
            out.loss_sum.backward()
            loss = float(out.loss_sum.detach())
            check.report.put("methods", **{name: {"loss": loss, "finite": run.finite_gradients(), "waits": waits}})


def greedy_answers(device: torch.device, method: PruningMethod | None, tokens: int = 12) -> Tensor:
    """[samples, tokens] of a small float32 model with weights and images drawn on the CPU."""
    geometry = small_geometry()
    model, anyres = bench.build(geometry, CPU)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    inputs = bench_generate.make_inputs(model, anyres, list(geometry.samples))
    inputs = {key: value.to(device) for key, value in inputs.items()}
    prune(model.eval().to(device), method)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        answers = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    unprune(model)
    return answers[:, -tokens:].cpu()


def generate(check: Check) -> None:
    """Greedy answers of the device and the CPU."""
    for name in ("dense", "next_layer"):
        ours, reference = (greedy_answers(place, METHODS_COMPARED[name]) for place in (check.device, CPU))
        check.report.put("generate", **{name: {"equal": torch.equal(ours, reference), "tokens": ours.tolist()}})
