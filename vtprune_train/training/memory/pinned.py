"""Copies of a run's state in host memory, so that training continues while they are written. Tensors are allocated from
a few large blocks, which are reused by every save.

Blocks are anonymous mappings of exactly the required size, page-locked by ``cudaHostRegister`` if the state is on a
GPU. PyTorch's pinned allocator would round every request up to a power of two: 32 GiB instead of 25.2 GiB for a float32
copy of 6.7 billion weights.

A tensor made by ``torch.frombuffer`` has a storage of its own size, so ``torch.save`` writes only its bytes. For a view
of a large tensor it would write the whole storage.
"""

from __future__ import annotations

import copy
import math
import mmap
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch

BLOCK = 2**28  # bytes of a block that several tensors share
OWN_BLOCK = 2**26  # bytes from which a tensor gets a separate block
ALIGNMENT = 64
PAGE = mmap.PAGESIZE


class Layout:
    """Places tensors in blocks by their sizes, in order. ``blocks`` are the sizes of the blocks in use."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self._shared: list[int] = []  # indices of blocks that several tensors share
        self._ends: list[int] = []  # used bytes of each block

    def place(self, size: int) -> tuple[int, int]:
        """Place a tensor of ``size`` bytes. Returns the index of its block and its offset there."""
        if size >= OWN_BLOCK:
            return self._add(math.ceil(size / PAGE) * PAGE, size), 0
        for block in self._shared:
            offset = -(-self._ends[block] // ALIGNMENT) * ALIGNMENT
            if offset + size <= BLOCK:
                self._ends[block] = offset + size
                return block, offset
        block = self._add(BLOCK, size)
        self._shared.append(block)
        return block, 0

    def _add(self, size: int, used: int) -> int:
        self.blocks.append(size)
        self._ends.append(used)
        return len(self.blocks) - 1


def pinned_bytes(sizes: Iterable[int]) -> int:
    """Total bytes of the blocks for tensors of these sizes (in bytes), copied in this order."""
    layout = Layout()
    for size in sizes:
        layout.place(size)
    return sum(layout.blocks)


class Arena:
    """Allocates tensors from blocks, page-locked if ``lock``. After :meth:`begin` the same requests get the same
    memory."""

    def __init__(self, lock: bool) -> None:
        self._lock = lock
        self._blocks: list[_Block] = []
        self._layout = Layout()

    @property
    def num_bytes(self) -> int:
        return sum(block.size for block in self._blocks)

    def begin(self) -> None:
        """Reuse all memory. Tensors allocated before refer to the same memory and are overwritten."""
        self._layout = Layout()

    def allocate(self, like: torch.Tensor) -> torch.Tensor:
        """Allocate an uninitialized contiguous host tensor with the shape and dtype of ``like``, which must not be
        empty. Raises a ``RuntimeError`` if not enough memory can be locked."""
        block, offset = self._layout.place(like.numel() * like.element_size())
        size = self._layout.blocks[block]
        if block < len(self._blocks) and self._blocks[block].size != size:
            self._release(block)  # sizes changed: reallocate from here on
        if block == len(self._blocks):
            self._blocks.append(_Block(size, self._lock))
        memory = self._blocks[block].memory
        return torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=offset).view(like.shape)

    def trim(self) -> None:
        """Free the blocks that were not used since :meth:`begin`."""
        self._release(len(self._layout.blocks))

    def _release(self, first: int) -> None:
        for block in self._blocks[first:]:
            block.unlock()
        del self._blocks[first:]


class _Block:
    def __init__(self, size: int, lock: bool):
        self.size, self.memory, self._locked_at = size, mmap.mmap(-1, size), 0
        if lock:
            address = torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr()
            code = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
            if code:
                raise RuntimeError(
                    f"cannot page-lock {size / 2**30:.2f} GiB of host memory for a checkpoint (CUDA error {code})"
                    "; free host memory or raise the limit of locked memory (ulimit -l)"
                )
            self._locked_at = address

    def unlock(self) -> None:
        if self._locked_at:
            code = int(torch.cuda.cudart().cudaHostUnregister(self._locked_at))
            assert code == 0, f"cudaHostUnregister failed with CUDA error {code}"
            self._locked_at = 0


class HostCopies:
    """Copies of state in host memory (pinned for state on a GPU); every save reuses the memory."""

    def __init__(self) -> None:
        self._arenas = {on_gpu: Arena(lock=on_gpu) for on_gpu in (False, True)}
        self._taken: dict[tuple[Any, ...], torch.Tensor] = {}
        self._sources: list[torch.Tensor] = []

    def begin(self) -> None:
        """Start new copies in the same memory; previous copies are overwritten."""
        self._taken, self._sources = {}, []
        for arena in self._arenas.values():
            arena.begin()

    def copy(self, value: Any) -> Any:
        """Copy ``value`` deeply, with all tensors in nested dicts, lists and tuples copied to the host. A tensor that
        occurs twice (tied weights) is copied once."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            copied: dict[Any, Any] = OrderedDict() if isinstance(value, OrderedDict) else {}
            copied.update((key, self.copy(item)) for key, item in value.items())
            if hasattr(value, "_metadata"):  # in a module's state dict
                copied._metadata = copy.deepcopy(value._metadata)  # type: ignore[attr-defined]
            return copied
        if isinstance(value, list):
            return [self.copy(item) for item in value]
        if type(value) is tuple:
            return tuple(self.copy(item) for item in value)
        return copy.deepcopy(value)

    def finish(self) -> None:
        """Wait until all copies are complete."""
        if any(source.is_cuda for source in self._sources):
            torch.cuda.synchronize()
        self._sources = []
        for arena in self._arenas.values():
            arena.trim()

    def num_bytes(self) -> int:
        """Bytes copied since :meth:`begin`."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._taken.values())

    def _tensor(self, source: torch.Tensor) -> torch.Tensor:
        source = source.detach()
        key = (source.data_ptr(), source.dtype, tuple(source.shape), tuple(source.stride()), str(source.device))
        if source.numel() and key in self._taken:
            return self._taken[key]
        if not source.numel():
            return source.cpu().clone()
        target = self._arenas[source.is_cuda].allocate(source)
        target.copy_(source, non_blocking=source.is_cuda)
        self._taken[key] = target
        self._sources.append(source)  # keep it alive until copied, so that no other tensor gets its address
        return target
