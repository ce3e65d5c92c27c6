"""The peak of allocated memory within a block of code: from the CUDA allocator's statistics, or on a CPU from every
allocation and release that PyTorch's profiler records (a process's resident size would show freed memory too)."""

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
    """What :func:`track_allocations` found, once its block has ended: bytes allocated at its start, and for each phase
    the most at a time (``peaks``) and those at its end (``ends``)."""

    def __init__(self, device: torch.device):
        self.device = device
        self.start = 0
        self.peaks: dict[str, int] = {}
        self.ends: dict[str, int] = {}

    @property
    def peak(self) -> int:
        """Most bytes allocated at a time in any phase."""
        return max(self.peaks.values(), default=self.start)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the block whose peak is wanted; a name may come several times."""
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
        """Replay the profiler's record of allocations, releases and phases."""
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
    """(time, bytes) of each allocation and release. A release in a thread that is not profiled (gloo's) is missing from
    the record; it is noticed when the place is used again."""
    starts: list[int] = []  # of live blocks, ascending
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
    """Follow the memory that tensors on ``device`` take, phase by phase."""
    found = Allocations(device)
    if device.type == "cuda":
        found.start = torch.cuda.memory_allocated(device)
        yield found
        return
    found.start = live_bytes(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    found._read(profiler.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]


def live_bytes(device: torch.device) -> int:
    """Bytes of all tensors on ``device`` that Python objects refer to; storages that tensors share count once."""
    gc.collect()
    storages = {}
    for value in gc.get_objects():
        if type(value) in (torch.Tensor, torch.nn.Parameter) and value.device.type == device.type:
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_memory_bytes(device: torch.device) -> int:
    """Most device memory allocated so far, or on a CPU the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
