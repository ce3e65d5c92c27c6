"""Measures the peak of allocated memory in a block of code: from the CUDA allocator's statistics, or on a CPU from the
allocations and releases that PyTorch's profiler records (the process's resident size would include freed memory)."""

from __future__ import annotations

import bisect
import gc
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

PHASE = "phase:"


class Allocations:
    """Results of :func:`track_allocations`, available after its block: bytes allocated at the ``start``, and for each
    phase the peak (``peaks``) and the bytes allocated at its end (``ends``)."""

    def __init__(self, device: torch.device):
        self.device = device
        self.start = 0
        self.peaks: dict[str, int] = {}
        self.ends: dict[str, int] = {}

    @property
    def peak(self) -> int:
        """Largest peak of any phase."""
        return max(self.peaks.values(), default=self.start)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a part of the block; phases of the same name are combined."""
        if self.device.type != "cuda":
            with record_function(PHASE + name):
                yield
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        try:
            yield
        finally:
            self._note(name, torch.cuda.max_memory_allocated(self.device), torch.cuda.memory_allocated(self.device))

    def _note(self, name: str, peak: int, end: int) -> None:
        self.peaks[name] = max(self.peaks.get(name, 0), peak)
        self.ends[name] = end

    def _read(self, roots: list[Any]) -> None:
        """Replay the allocations, releases and phases that the profiler recorded."""
        nodes, left = [], list(roots)
        while left:
            nodes.append(left.pop())
            left += nodes[-1].children
        phases = [node for node in nodes if node.name.startswith(PHASE)]
        changes = _changes([node for node in nodes if node.name == "[memory]"])
        for node in sorted(phases, key=lambda node: node.start_time_ns):
            now = self.start + sum(change for at, change in changes if at < node.start_time_ns)
            peak = now
            for at, change in changes:
                if node.start_time_ns <= at <= node.end_time_ns:
                    now += change
                    peak = max(peak, now)
            self._note(node.name.removeprefix(PHASE), peak, now)


def _changes(events: list[Any]) -> list[tuple[int, int]]:
    """(time, bytes) of each allocation and release. Releases in threads that are not profiled (gloo's) are missing from
    the record; they are detected when the address is reused."""
    starts: list[int] = []  # addresses of live blocks, ascending
    sizes: dict[int, int] = {}
    changes = []
    for event in sorted(events, key=lambda event: event.start_time_ns):
        place, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        at = event.start_time_ns
        first = bisect.bisect_left(starts, place)
        if size < 0:
            if place in sizes:
                changes.append((at, -sizes.pop(place)))
                del starts[first]
            continue
        if first and starts[first - 1] + sizes[starts[first - 1]] > place:
            first -= 1
        while first < len(starts) and starts[first] < place + size:
            changes.append((at, -sizes.pop(starts.pop(first))))
        starts.insert(first, place)
        sizes[place] = size
        changes.append((at, size))
    return changes


@contextmanager
def track_allocations(device: torch.device) -> Iterator[Allocations]:
    """Track the memory of tensors on ``device`` by phase."""
    allocations = Allocations(device)
    if device.type == "cuda":
        allocations.start = torch.cuda.memory_allocated(device)
        yield allocations
        return
    allocations.start = live_bytes(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield allocations
    allocations._read(profiler.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]


def live_bytes(device: torch.device) -> int:
    """Bytes of all tensors on ``device`` that Python objects refer to; shared storages count once."""
    gc.collect()
    storages = {}
    for value in gc.get_objects():
        if type(value) in (torch.Tensor, torch.nn.Parameter) and value.device.type == device.type:
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of allocated device memory so far; on a CPU the process's peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
