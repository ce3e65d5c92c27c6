"""Rows of the training suites of ``bench.py``: interleaved measurements of forward and backward passes, and their
table."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vtprune_train import prune, unprune
from vtprune_train.core.flops import PassCost, TrainingCost
from vtprune_train.core.plan import plan_pass
from vtprune_train.core.stream import IGNORE, ImageSpan, PackedBatch, SegmentLayout
from vtprune_train.models import HFModule
from vtprune_train.models.forward.decoder import RANGES, SELECTOR
from vtprune_train.pruning.base import PruningMethod


@dataclass
class Row:
    """One benchmark configuration and its measurements."""

    name: str
    method: PruningMethod | None
    run: Callable[[], torch.Tensor]
    flops: float
    seconds: list[float] = field(default_factory=list)
    selector_seconds: list[float] = field(default_factory=list)
    peak_memory: int = 0


def range_seconds(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Seconds that a call spends in each profiler range of :mod:`vtprune_train.models.forward.decoder`. On CUDA this is
    kernel time, read from the profiler afterwards, so that the call does not synchronize."""
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        run()
        synchronize(device)
    seconds = dict.fromkeys(RANGES, 0.0)
    for event in profiler.events():
        if event.name in seconds and event.device_type == DeviceType.CPU:
            kernels = sum(child.device_time_total for child in event.cpu_children)
            seconds[event.name] += 1e-6 * (kernels if on_cuda else event.cpu_time_total)
    return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(row: Row, model: HFModule, optimizer: torch.optim.Optimizer | None, device: torch.device) -> None:
    """One repeat: forward, backward and optionally an optimizer step."""
    if row.name != "hf_padded":
        prune(model, row.method)
    reset_peak(device)
    synchronize(device)
    began = time.perf_counter()
    row.run().backward()
    if optimizer is not None:
        optimizer.step()
    synchronize(device)
    row.seconds.append(time.perf_counter() - began)
    model.zero_grad(set_to_none=True)
    row.peak_memory = max(row.peak_memory, peak_memory(device))
    if row.method is not None:
        seconds = range_seconds(row.run, device)
        row.selector_seconds.append(sum(seconds[name] for name in SELECTOR))
    if row.name != "hf_padded":
        unprune(model)


def reset_peak(device: torch.device) -> None:
    """Reset the memory peak: the allocator's on CUDA, the process's resident size (Linux) on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak since :func:`reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def check_no_sync(rows: list[Row], model: HFModule) -> None:
    """On CUDA, run each packed forward pass with sync debug mode "error" to check that it does not synchronize."""
    for row in rows:
        if row.name == "hf_padded":
            continue
        prune(model, row.method)
        torch.cuda.set_sync_debug_mode("error")
        try:
            row.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            unprune(model)


def repeat(
    rows: list[Row], model: HFModule, optimizer: torch.optim.Optimizer | None, device: torch.device, repeats: int
) -> None:
    """Measure all rows in interleaved repeats."""
    if device.type == "cuda":
        for row in rows:
            measure(row, model, optimizer, device)
            row.seconds.clear()
            row.selector_seconds.clear()
        check_no_sync(rows, model)
    for _ in range(repeats):
        for row in rows:
            measure(row, model, optimizer, device)


def segment_of(span: ImageSpan, text: int) -> SegmentLayout:
    """Build one sample: a text token, the image or video (which must start at 1), a question (a third of the text) and
    a supervised answer."""
    question = max(4, text // 3)
    length = text + span.length
    first = question + span.length
    return SegmentLayout(length, (span,), (first - 1,), tuple(range(first, length)))


def random_ids(segment: SegmentLayout, visual_token: int, vocab: int, rng: np.random.Generator) -> np.ndarray:
    """[L] token ids of a sample; text tokens are 5 and above."""
    ids = rng.integers(5, vocab, segment.length)
    for span in segment.spans:
        ids[span.offsets()] = visual_token
    return ids


def padded_texts(segments: Sequence[SegmentLayout], ids: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """Inputs of a transformers model without images or videos, padded on the right."""
    longest = max(map(len, ids))
    padded = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE}
    rows: dict[str, list[np.ndarray]] = {name: [] for name in padded}
    for segment, tokens in zip(segments, ids, strict=True):
        labels = np.full(len(tokens), IGNORE)
        labels[list(segment.supervised_offsets)] = tokens[list(segment.supervised_offsets)]
        values = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "labels": labels}
        for name, filling in padded.items():
            rows[name].append(np.pad(values[name], (0, longest - len(tokens)), constant_values=filling))
    return {name: torch.from_numpy(np.stack(parts)) for name, parts in rows.items()}


def pack_samples(
    segments: Sequence[SegmentLayout],
    ids: Sequence[np.ndarray],
    method: PruningMethod | None,
    num_layers: int,
    vision: Mapping[str, Any],
) -> PackedBatch:
    """The packed batch; ``vision`` are the fields of :class:`PackedBatch` that describe images and videos."""
    starts = np.cumsum([0, *map(len, ids)])[:-1].tolist()
    visual, supervised = (
        np.concatenate([start + rows(segment) for segment, start in zip(segments, starts, strict=True)])
        for rows in (
            lambda segment: np.concatenate([span.offsets() for span in segment.spans]),
            lambda segment: np.array(segment.supervised_offsets),
        )
    )
    flat = np.concatenate(ids)
    targets = torch.from_numpy(flat[supervised])
    return PackedBatch(
        input_ids=torch.from_numpy(flat),
        visual_rows=torch.from_numpy(visual),
        plan=plan_pass(segments, num_layers, method),
        targets=targets,
        answer_of_target=torch.zeros_like(targets),
        num_answers=1,
        **vision,
    )


def rows_of(
    model: HFModule,
    padded: Mapping[str, torch.Tensor],
    batches: Mapping[str, tuple[PruningMethod | None, PackedBatch]],
    cost: TrainingCost,
    vision_flops: float,
) -> list[Row]:
    """The rows of the padded transformers model and of the packed ``batches``, with their forward and backward FLOPs.
    ``vision_flops``: FLOPs of tower and projector."""

    def padded_loss() -> torch.Tensor:
        return model(**padded, use_cache=False).loss

    # The padded model pads to the longest sample and computes logits for all positions.
    samples, longest = padded["input_ids"].shape
    lengths = np.full((samples, 1), longest)
    padded_flops = cost.text(lengths, [cost.decoder.num_layers], lengths[:, 0]).sum() + vision_flops
    rows = [Row("hf_padded", None, padded_loss, float(padded_flops))]
    for name, (method, batch) in batches.items():

        def packed_loss(batch: PackedBatch = batch) -> torch.Tensor:
            return model(batch).loss_sum / len(batch.targets)

        supervised = np.array([len(segment.supervised_offsets) for segment in batch.plan.outline.segments])
        flops = PassCost.of(cost, batch.plan, method, supervised).flops + vision_flops
        rows.append(Row(name, method, packed_loss, flops))
    return rows


def environment(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    threads = f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else threads,
        "geometry": arguments.geometry,
        "repeats": arguments.repeats,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The measurements of each row, for the report."""
    return [
        {
            "name": row.name,
            "median_s": statistics.median(row.seconds),
            "min_s": min(row.seconds),
            "max_s": max(row.seconds),
            "flops": row.flops,
            "peak_memory_bytes": row.peak_memory,
            "selector_share": (
                statistics.median(row.selector_seconds) / statistics.median(row.seconds)
                if row.selector_seconds
                else 0.0
            ),
        }
        for row in rows
    ]


def ratios(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Time and FLOPs of each method, relative to dense, and time relative to the padded model."""
    by_name = {row.name: row for row in rows}
    median = {row.name: statistics.median(row.seconds) for row in rows}
    found = {}
    for name in (row.name for row in rows if row.name not in ("hf_padded", "dense")):
        time_ratio, flop_ratio = median[name] / median["dense"], by_name[name].flops / by_name["dense"].flops
        found[name] = {"time": time_ratio, "flops": flop_ratio, "time_over_flops": time_ratio / flop_ratio}
        if "hf_padded" in median:
            found[name]["time_over_hf_padded"] = median[name] / median["hf_padded"]
    return found


def training_report(
    rows: list[Row], segments: Sequence[SegmentLayout], arguments: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    return {
        **environment(arguments, device),
        "optimizer_step": arguments.step,
        "sample_tokens": [segment.length for segment in segments],
        "rows": table(rows),
        "ratios": ratios(rows),
    }


def print_report(report: dict[str, Any]) -> None:
    print(f"{report['device']}, torch {report['torch']}, geometry {report['geometry']}, {report['repeats']} repeats")
    print(
        f"tokens of the samples: {report['sample_tokens']}, forward + backward{' + step' * report['optimizer_step']}\n"
    )
    print_table(report["rows"])
    print()
    for name, ratio in report["ratios"].items():
        padded = f", {ratio['time_over_hf_padded']:.3f} of hf_padded" if "time_over_hf_padded" in ratio else ""
        print(
            f"{name}: time {ratio['time']:.3f} of dense, FLOPs {ratio['flops']:.3f}, quotient "
            f"{ratio['time_over_flops']:.3f}{padded}"
        )


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'':24}{'median s':>9}{'min':>8}{'max':>8}{'TFLOP':>9}{'peak GB':>9}{'selector':>10}")
    for row in rows:
        print(
            f"{row['name']:24}{row['median_s']:>9.3f}{row['min_s']:>8.3f}{row['max_s']:>8.3f}"
            f"{row['flops'] / 1e12:>9.3f}{row['peak_memory_bytes'] / 1e9:>9.2f}{row['selector_share']:>10.2%}"
        )
