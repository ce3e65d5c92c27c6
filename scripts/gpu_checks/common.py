"""Shared by all parts: the report, the large model, timing, and errors between tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import bench
from vtprune_train.models import HFModule
from vtprune_train.models.families.llava_next import AnyRes
from vtprune_train.models.forward.recompute import checkpoint_activations

ROOT = Path(__file__).resolve().parent.parent.parent
# LLaVA-NeXT-7B: 7 samples of mixed lengths, 17,435 tokens and 31 tiles.
MIXED_7B = (
    ((672, 672), 121), ((672, 672), 121), ((336, 672), 121), ((500, 667), 121), ((600, 600), 121), ((640, 480), 121),
    ((200, 640), 121),
)  # fmt: skip


class Report:
    """Values by part, written to ``gpu_check.json`` after each value."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.values, self.began = folder / "gpu_check.json", {}, time.time()  # type: ignore[var-annotated]

    def put(self, part: str, **values: Any) -> None:
        self.values.setdefault(part, {}).update(values)
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.values, indent=1, default=str))
        temporary.replace(self.file)
        for key, value in values.items():
            print(
                f"[{time.time() - self.began:6.1f}s] {part}.{key}: {json.dumps(value, default=str)[:400]}", flush=True
            )


@dataclass
class Check:
    """One run of the script: its device, its sizes, and its results."""

    report: Report
    out: Path
    device: torch.device
    geometry_name: str
    attention: str

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        bench.synchronize(self.device)

    def free(self) -> None:
        """Return cached memory to the device, so that peaks of different parts do not mix."""
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    @contextlib.contextmanager
    def noting_failure(self, part: str, name: str) -> Iterator[None]:
        """Record a failure in the report and continue; the script then fails at its end."""
        try:
            yield
        except TimeoutError:
            raise
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.report.put("failed", **{f"{part} {name}": f"{type(error).__name__}: {error} at {where}"[:2000]})

    def timed(self, run: Callable[[], Any], repeats: int = 3, warmup: int = 1) -> dict[str, float]:
        """Median, minimum and maximum milliseconds of a call; on CUDA between two events, without synchronization in
        between."""
        for _ in range(warmup):
            run()
        self.synchronize()
        times = [self._milliseconds(run) for _ in range(repeats)]
        return {"ms": statistics.median(times), "min": min(times), "max": max(times)}

    def _milliseconds(self, run: Callable[[], Any]) -> float:
        if not self.on_cuda:
            began = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - began)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        self.synchronize()
        return begin.elapsed_time(end)

    @cached_property
    def big(self) -> BigModel:
        return BigModel.build(self.geometry_name, self.device)


@dataclass
class BigModel:
    """The model for timing, created once: LLaVA-NeXT-7B with random weights by default."""

    geometry: bench.Geometry
    model: HFModule
    anyres: AnyRes
    samples: bench.Samples

    @classmethod
    def build(cls, name: str, device: torch.device) -> BigModel:
        geometry = dataclasses.replace(bench.GEOMETRIES[name], checkpointing=True)
        if name == "7b":
            geometry = dataclasses.replace(geometry, samples=MIXED_7B)
        model, anyres = bench.build(geometry, device)
        vocab = model.config.text_config.vocab_size
        return cls(geometry, model, anyres, bench.make_samples(geometry, anyres, vocab, device))

    @property
    def layers(self) -> Any:
        return self.model.model.language_model.layers

    def recompute(self, first: int | None) -> None:
        """Recompute ``count`` decoder layers in the backward pass, or all for ``None``."""
        checkpoint_activations(self.model, None if first is None else range(first))

    def clear_gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def pack(self, method: Any, samples: bench.Samples | None = None) -> Any:
        return bench.pack(samples or self.samples, method, len(self.layers), self.model.device)

    def other_samples(self, count: int) -> bench.Samples:
        """Only the first ``count`` samples, for another number of segments and another length."""
        geometry = dataclasses.replace(self.geometry, samples=self.geometry.samples[:count])
        return bench.make_samples(geometry, self.anyres, self.model.config.text_config.vocab_size, self.model.device)


def relative_error(ours: torch.Tensor, reference: torch.Tensor, floor: float = 1e-30) -> float:
    """Norm of the difference over the reference's norm, or over ``floor`` if that is more."""
    ours, reference = ours.detach().double().cpu(), reference.detach().double().cpu()
    return float((ours - reference).norm() / reference.norm().clamp(min=floor))


def worst_gradient(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative error of a parameter's gradient, and the parameter. Gradients that are zero in theory (such
    as that of a key projection's bias) are only rounding errors, so the divisor is at least a thousandth of the largest
    norm."""
    floor = 1e-3 * max(float(grad.double().norm()) for grad in reference.values())
    return max((relative_error(ours[name], grad, floor), name) for name, grad in reference.items())


def kept_differ(ours: Any, reference: Any) -> list[int]:
    """Number of rows that only one of two passes keeps, at each drop."""
    return [len(set(a.tolist()) ^ set(b.tolist())) for a, b in zip(ours, reference, strict=True)]


@contextlib.contextmanager
def device_waits(device: torch.device) -> Iterator[list[str]]:
    """Places (``file:line``) where the host waits for the device; always empty on a CPU."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    # Ignore the one-time notice that this mode is a prototype.
    waits = [w for w in seen if "called a synchronizing CUDA operation" in str(w.message)]
    found += [f"{Path(w.filename).name}:{w.lineno}" for w in waits]
