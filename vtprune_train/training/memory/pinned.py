"""Host memory for copies of tensors: few large blocks, from which tensors are cut, the same for every save.

Blocks are anonymous mappings of exactly the size they need, page-locked beside a GPU by ``cudaHostRegister``. PyTorch's
own pinned allocator rounds every request up to a power of two: 32 GiB for a float32 copy of 6.7 billion weights, whose
25.2 GiB no choice of block sizes would make fit better.

A tensor made by ``torch.frombuffer`` has a storage of its own size, so ``torch.save`` writes its bytes alone, where a
view of a large tensor would bring all of that one's storage along.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable

import torch

BLOCK = 2**28  # of tensors that share one
OWN_BLOCK = 2**26  # bytes from which a tensor gets a block of its own
ALIGNMENT = 64
PAGE = mmap.PAGESIZE


class Layout:
    """Where tensors lie, by size alone, in the order they come. ``blocks`` are the sizes of the blocks in use."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self._shared: list[int] = []  # which of them several tensors share
        self._ends: list[int] = []  # of what lies in each block

    def place(self, size: int) -> tuple[int, int]:
        """The block of a tensor of ``size`` bytes, and its offset there."""
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
    """Bytes of the blocks that hold tensors of these sizes in bytes, copied in this order."""
    layout = Layout()
    for size in sizes:
        layout.place(size)
    return sum(layout.blocks)


class Arena:
    """The blocks themselves, page-locked if ``lock``. After :meth:`begin` the same requests get the same memory."""

    def __init__(self, lock: bool) -> None:
        self._lock = lock
        self._blocks: list[_Block] = []
        self._layout = Layout()

    @property
    def num_bytes(self) -> int:
        return sum(block.size for block in self._blocks)

    def begin(self) -> None:
        """All memory is free again. Tensors cut before go on showing it, whatever is written there."""
        self._layout = Layout()

    def cut(self, like: torch.Tensor) -> torch.Tensor:
        """An uninitialised contiguous tensor on the host, of the shape and dtype of ``like``, which is not empty.

        Raises:
            RuntimeError: there is not enough memory to lock.
        """
        block, offset = self._layout.place(like.numel() * like.element_size())
        size = self._layout.blocks[block]
        if block < len(self._blocks) and self._blocks[block].size != size:
            self._release(block)  # sizes have changed from here on
        if block == len(self._blocks):
            self._blocks.append(_Block(size, self._lock))
        memory = self._blocks[block].memory
        return torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=offset).view(like.shape)

    def trim(self) -> None:
        """Give back the blocks that nothing was cut from since :meth:`begin`."""
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
