"""Copies of a run's state in host memory, so that training goes on while they are written."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch

from vtprune_train.training.memory.pinned import Arena


class HostCopies:
    """Copies of state in host memory (pinned beside a GPU), the same memory for every save."""

    def __init__(self) -> None:
        self._arenas = {on_gpu: Arena(lock=on_gpu) for on_gpu in (False, True)}
        self._taken: dict[tuple[Any, ...], torch.Tensor] = {}
        self._sources: list[torch.Tensor] = []

    def begin(self) -> None:
        """Forget what was copied, keep the memory: copies made before are overwritten."""
        self._taken, self._sources = {}, []
        for arena in self._arenas.values():
            arena.begin()

    def copy(self, value: Any) -> Any:
        """``value`` with every tensor in nested dicts, lists and tuples copied to the host, and everything else so
        that later changes do not reach it. One tensor met twice (tied weights) is copied once."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            made: dict[Any, Any] = OrderedDict() if isinstance(value, OrderedDict) else {}
            made.update((key, self.copy(item)) for key, item in value.items())
            if hasattr(value, "_metadata"):  # of a module's state
                made._metadata = copy.deepcopy(value._metadata)  # type: ignore[attr-defined]
            return made
        if isinstance(value, list):
            return [self.copy(item) for item in value]
        if type(value) is tuple:
            return tuple(self.copy(item) for item in value)
        return copy.deepcopy(value)

    def finish(self) -> None:
        """Wait until what :meth:`copy` began is in the host's memory."""
        if any(source.is_cuda for source in self._sources):
            torch.cuda.synchronize()
        self._sources = []
        for arena in self._arenas.values():
            arena.trim()

    def num_bytes(self) -> int:
        """Size of what was copied since :meth:`begin`."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._taken.values())

    def _tensor(self, source: torch.Tensor) -> torch.Tensor:
        source = source.detach()
        key = (source.data_ptr(), source.dtype, tuple(source.shape), tuple(source.stride()), str(source.device))
        if source.numel() and key in self._taken:
            return self._taken[key]
        if not source.numel():
            return source.cpu().clone()
        target = self._arenas[source.is_cuda].cut(source)
        target.copy_(source, non_blocking=source.is_cuda)
        self._taken[key] = target
        self._sources.append(source)  # alive until copied, so that no other tensor gets its address
        return target
