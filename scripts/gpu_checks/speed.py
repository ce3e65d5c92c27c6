"""Measures speed: decoder and whole step of the 7B model, dense, pruned and padded, eager, compiled, with FP8 and
Liger."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity
from torch.profiler import profile as start_profiler

import bench
import bench_rows
from gpu_checks.common import Check, kept_differ, relative_error
from gpu_checks.numerics import run_backend
from vtprune_train import PyramidDrop, prune, unprune
from vtprune_train.core.flops import TYPICAL_TEXT, TYPICAL_VISUAL, DecoderGeometry, PassCost, TrainingCost
from vtprune_train.core.plan import plan_pass
from vtprune_train.core.stream import to_device
from vtprune_train.models.families.towers import tile_tower
from vtprune_train.models.forward import attention as backends
from vtprune_train.models.forward.compile import compile_layers, uncompile_layers
from vtprune_train.models.forward.decoder import SELECTOR
from vtprune_train.models.forward.head import chunked_loss
from vtprune_train.models.forward.kernels import use_fp8, use_liger
from vtprune_train.pruning.base import PruningMethod

TYPICAL_SAMPLES = 7
HEADS = ((32_064, 4096), (152_064, 3584))  # words and width: LLaVA-NeXT-7B, Qwen2.5-VL-7B
DENSE, DROPPING = "dense", "pyramiddrop_next_layer"
METHODS: dict[str, PruningMethod | None] = {
    DENSE: None,
    DROPPING: PyramidDrop(rank_with="next_layer"),
    "pyramiddrop_this_layer": PyramidDrop(rank_with="this_layer"),
}


# --------------------------------------------------------------------------------------------------------- measurements
@contextlib.contextmanager
def pruned(check: Check, method: PruningMethod | None) -> Iterator[None]:
    prune(check.big.model, method, attention=check.attention)
    try:
        yield
    finally:
        unprune(check.big.model)
        check.big.clear_gradients()


def measured(check: Check, run: Callable[[], Any], flops: float, repeats: int) -> dict[str, Any]:
    """Time of a step, FLOPs as the project counts them (no recomputation), their rate, and memory."""
    check.free()
    values: dict[str, Any] = check.timed(run, repeats)
    values |= {"tflop": flops / 1e12, "tflop_s": flops / values["ms"] / 1e9}
    if check.on_cuda:
        values["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        values["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return values


@contextlib.contextmanager
def noting_lack_of_memory(check: Check, part: str, label: str) -> Iterator[None]:
    """Record a step that runs out of memory as a result; any other error is a failure."""
    with check.noting_failure(part, label):
        try:
            yield
        except torch.OutOfMemoryError as error:
            check.report.put(part, **{label: {"out_of_memory": str(error)[:200]}})
    check.big.clear_gradients()
    check.free()


def decoder_steps(check: Check, part: str, label: str, names: tuple[str, ...], repeats: int = 3) -> None:
    """Forward and backward of the decoder layers and the final norm on samples of typical length."""
    config = check.big.model.config
    cost = TrainingCost(DecoderGeometry.of(config.text_config), tile_tower(config), True, True)
    typical = (TYPICAL_VISUAL, TYPICAL_TEXT) if check.geometry_name == "7b" else (200, 20)
    segments = [bench.segment_of(*typical)] * TYPICAL_SAMPLES
    decoder = check.big.model.model.language_model
    num_tokens = sum(segment.length for segment in segments)
    embeds = torch.randn(num_tokens, decoder.config.hidden_size, device=check.device, dtype=check.big.model.dtype)
    embeds.requires_grad_()
    for name in names:
        with noting_lack_of_memory(check, part, f"{label} {name}"), pruned(check, METHODS[name]):
            plan = plan_pass(segments, decoder.config.num_hidden_layers, METHODS[name])
            flops = PassCost.of(cost, plan, METHODS[name], np.zeros(len(segments))).flops
            placed = to_device(plan, check.device)
            weight = torch.randn(len(placed.predict_rows), embeds.shape[1], device=check.device, dtype=embeds.dtype)

            def step(placed: Any = placed, weight: Tensor = weight) -> None:
                hidden, _ = decoder(embeds, placed)
                hidden.backward(weight)

            check.report.put(part, **{f"{label} {name}": measured(check, step, flops, repeats)})
    embeds.grad = None


def whole_steps(check: Check, part: str, label: str, names: tuple[str, ...], repeats: int = 3) -> None:
    """Forward and backward of the whole model on samples of mixed lengths with a trained tower, and its profiler
    ranges."""
    rows = {row.name: row for row in bench.make_rows(check.big.model, check.big.samples, check.device)}
    for name in names:
        row = rows[name]
        context = contextlib.nullcontext() if name == "hf_padded" else pruned(check, row.method)
        with noting_lack_of_memory(check, part, f"{label} {name}"), context:

            def step(row: bench.Row = row) -> None:
                row.run().backward()

            values = measured(check, step, row.flops, repeats)
            check.big.clear_gradients()
            if name != "hf_padded":
                values |= forward_ranges(check, row.run)
            check.report.put(part, **{f"{label} {name}": values})


def forward_ranges(check: Check, run: Callable[[], Tensor]) -> dict[str, float]:
    """Milliseconds of a forward pass and of its profiler ranges, and of launching it on the host."""
    began = time.perf_counter()
    loss = run()
    launched = 1e3 * (time.perf_counter() - began)
    check.synchronize()
    del loss
    seconds = bench_rows.range_seconds(run, check.device)
    marks = {f"{name.removeprefix('vtprune::')}_ms": 1e3 * value for name, value in seconds.items()}
    selector = 1e3 * sum(seconds[name] for name in SELECTOR)
    return {"forward_host_ms": launched, **marks, "selector_ms": selector}


# ---------------------------------------------------------------------------------------------------------------- parts
def decoder(check: Check) -> None:
    """The decoder only, dense and pruned, with all layers recomputed."""
    decoder_steps(check, "decoder", "eager", tuple(METHODS))


def seven(check: Check) -> None:
    """The whole step: packed, pruned and padded, with and without recomputed layers."""
    began = time.time()
    big = check.big
    check.report.put(
        "seven",
        build_seconds=time.time() - began,
        parameters=sum(p.numel() for p in big.model.parameters()),
        segments=[len(ids) for ids in big.samples.ids],
        tiles=int(big.samples.num_tiles.sum()),
    )
    whole_steps(check, "seven", "eager", tuple(METHODS))
    whole_steps(check, "seven", "eager", ("hf_padded",), repeats=2)
    for first in (len(big.layers) // 4, 0):  # only the first stage; none, which may not fit
        big.recompute(first)
        whole_steps(check, "seven", f"eager, {first} layers recomputed", (DROPPING,), repeats=2)
    big.recompute(None)


def profile(check: Check) -> None:
    """The longest kernels of a step, and a trace of the pruned one."""
    rows = {row.name: row for row in bench.make_rows(check.big.model, check.big.samples, check.device)}
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if check.on_cuda else [])]
    for name in (DROPPING, DENSE):
        with pruned(check, rows[name].method):
            rows[name].run().backward()
            with start_profiler(activities=activities) as profiler:
                rows[name].run().backward()
                check.synchronize()
        attribute = "self_device_time_total" if check.on_cuda else "self_cpu_time_total"
        averages = [(getattr(e, attribute) / 1e3, e.count, e.key[:110]) for e in profiler.key_averages()]
        kernels = sorted((entry for entry in averages if entry[0]), reverse=True)
        totals = {"kernel_ms": sum(entry[0] for entry in kernels), "launches": sum(entry[1] for entry in kernels)}
        check.report.put("profile", **{name: {**totals, "longest": kernels[:30]}})
        if name == DROPPING:
            trace = check.out / "trace.json"
            profiler.export_chrome_trace(str(trace))
            with trace.open("rb") as source, gzip.open(f"{trace}.gz", "wb", 6) as target:
                shutil.copyfileobj(source, target)
            trace.unlink()


def one_pass(
    check: Check, samples: bench.Samples | None = None, name: str = DROPPING
) -> tuple[float, list[Tensor], Tensor]:
    """Loss, kept rows and one gradient of a step."""
    method = METHODS[name]
    with pruned(check, method):
        out = check.big.model(check.big.pack(method, samples))
        out.loss_sum.backward()
        gradient = check.big.layers[0].mlp.up_proj.weight.grad.clone()
    return float(out.loss_sum.detach()), [kept.cpu() for kept in out.kept], gradient


def same_as_before(check: Check, part: str, before: tuple[float, list[Tensor], Tensor]) -> None:
    """Record the differences of a pruned step from an earlier one; ``seconds`` include compilation in the first
    call."""
    began = time.time()
    loss, kept, gradient = one_pass(check)
    check.report.put(
        part,
        seconds=time.time() - began,
        loss=[before[0], loss],
        kept_differ=kept_differ(kept, before[1]),
        gradient_error=relative_error(gradient, before[2]),
    )


def head_losses(check: Check) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Ways to sum the cross-entropy of ``(rows, weight, targets)``."""
    losses = {"chunks": lambda rows, weight, targets: chunked_loss(rows, weight, None, targets)[0]}
    if check.on_cuda and importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        losses["liger"] = lambda rows, weight, targets: LigerFusedLinearCrossEntropyFunction.apply(
            rows, weight, targets, None, None, -100, 0.0, 0.0, "sum"
        )[0]
    return losses


def exact_weight_gradient(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the head's weight, computed in float32 from the same values."""
    with torch.no_grad():
        pull = F.linear(rows.float(), weight.float()).softmax(dim=-1)
        pull[torch.arange(len(pull), device=pull.device), targets] -= 1.0
        return pull.t() @ rows.float()


def head(check: Check) -> None:
    """The loss over 2,048 supervised rows, in the project's chunks and by Liger's fused kernel: time, memory, and the
    error of the weight's gradient against float32."""
    for vocab, hidden in HEADS if check.geometry_name == "7b" else ((512, 64),):
        torch.manual_seed(0)
        rows = torch.randn(2048, hidden, device=check.device, dtype=torch.bfloat16, requires_grad=True)
        weight = (0.02 * torch.randn(vocab, hidden, device=check.device)).bfloat16().requires_grad_()
        targets = torch.randint(0, vocab, (2048,), device=check.device)
        reference = exact_weight_gradient(rows, weight, targets)
        for name, loss in head_losses(check).items():

            def step(loss: Any = loss, inputs: Any = (rows, weight, targets)) -> tuple[Tensor, ...]:
                return torch.autograd.grad(loss(*inputs), inputs[:2])

            error = relative_error(step()[1], reference)
            check.free()
            values = {"weight_gradient_error": error, **check.timed(step, 5, 2)}
            if check.on_cuda:
                values["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            check.report.put("head", **{f"{vocab} words, {name}": values})


@contextlib.contextmanager
def compiled(check: Check) -> Iterator[None]:
    """The large model with compiled layers; on a CPU they are only traced, which needs no compiler."""
    torch._dynamo.reset()
    counters.clear()
    compile_layers(check.big.model, backend="inductor" if check.on_cuda else "aot_eager")
    try:
        yield
    finally:
        uncompile_layers(check.big.model)
        torch._dynamo.reset()


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def compile_(check: Check) -> None:
    """Compiled layers: equal results, time, and recompilation for batches of other lengths or methods."""
    before = one_pass(check)
    with compiled(check):
        same_as_before(check, "compile", before)
        one_pass(check, name=DENSE)
        warm = num_graphs()
        for count, name in ((2, DROPPING), (1, "pyramiddrop_this_layer"), (len(check.big.samples.ids) - 1, DENSE)):
            one_pass(check, check.big.other_samples(count), name)
        check.report.put("compile", graphs=warm, recompilations=num_graphs() - warm)
        if not check.on_cuda:
            return
        decoder_steps(check, "compile", "decoder, compiled", (DENSE, DROPPING))
        whole_steps(check, "compile", "compiled", (DROPPING, DENSE))
        check.big.recompute(0)
        whole_steps(check, "compile", "compiled, 0 layers recomputed", (DROPPING, DENSE), repeats=2)
        check.big.recompute(None)


@contextlib.contextmanager
def fp8_linears(check: Check) -> Iterator[None]:
    """A context with the decoder's linear layers in FP8 by torchao, with tensorwise scales."""
    linears = {name: module for name, module in check.big.layers.named_modules() if isinstance(module, nn.Linear)}
    use_fp8(check.big.model.model.language_model, check.device)
    try:
        yield
    finally:
        for name, module in linears.items():
            parent, _, attribute = name.rpartition(".")
            setattr(check.big.layers.get_submodule(parent), attribute, module)


def fp8(check: Check) -> None:
    """FP8 linear layers in compiled layers: difference from bf16, and time."""
    if importlib.util.find_spec("torchao") is None:
        check.report.put("fp8", left_out="torchao is not installed")
        return
    if not check.on_cuda or torch.cuda.get_device_capability(check.device) < (8, 9):
        check.report.put("fp8", left_out="needs a GPU of compute capability 8.9 or more")
        return
    before = one_pass(check)
    with fp8_linears(check), compiled(check):
        same_as_before(check, "fp8", before)
        whole_steps(check, "fp8", "fp8, compiled", (DROPPING, DENSE))


def liger(check: Check) -> None:
    """Liger's kernels on the same weights. Later parts use them too."""
    if importlib.util.find_spec("liger_kernel") is None:
        check.report.put("liger", left_out="liger-kernel is not installed")
        return
    if not check.on_cuda:
        check.report.put("liger", left_out="its kernels need a GPU")
        return
    before = one_pass(check)
    use_liger(check.big.model.model.language_model)
    same_as_before(check, "liger", before)
    whole_steps(check, "liger", "liger", (DROPPING, DENSE))
    check.big.recompute(0)
    whole_steps(check, "liger", "liger, 0 layers recomputed", (DROPPING,), repeats=2)
    check.big.recompute(None)


def fa4(check: Check) -> None:
    """FlashAttention 4 against PyTorch's kernel at the 7B shapes, and the steps with it."""
    if reason := backends.unavailable_because("flash_attention_4", check.device, torch.bfloat16):
        check.report.put("fa4", left_out=reason)
        return
    lengths = tuple(len(ids) for ids in check.big.samples.ids)
    flops = 4 * 128 * 32 * sum(n * (n + 1) / 2 for n in lengths)
    weight = torch.randn(1, sum(lengths), 32, 128, device=check.device, dtype=torch.bfloat16)
    for backend in ("varlen_torch", "flash_attention_4"):
        q, k, v = (torch.randn_like(weight).transpose(1, 2).requires_grad_() for _ in range(3))

        def forward(backend: str = backend, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return run_backend(backend, q, k, v, lengths, None)

        def both(forward: Callable[[], Tensor] = forward) -> None:
            forward().backward(weight)

        one = check.timed(forward, 10, 3)["ms"]
        backward = check.timed(both, 10, 3)["ms"] - one
        values = {"forward_ms": one, "forward_tflop_s": flops / one / 1e9}
        values |= {"backward_ms": backward, "backward_tflop_s": 2.5 * flops / backward / 1e9}
        check.report.put("fa4", **{backend: values})
    check.attention = "flash_attention_4"
    whole_steps(check, "fa4", "flash_attention_4", (DROPPING, DENSE))
