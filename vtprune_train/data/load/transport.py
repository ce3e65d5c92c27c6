"""Transfers tasks and batches between a rank and its workers without locks and without ``/dev/shm``."""

from __future__ import annotations

import mmap
import os
import pickle
import queue
import select
import socket
from dataclasses import replace
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtprune_train.core.stream import PackedBatch, map_leaves

MESSAGE = 65536  # maximum bytes of a message; batches are sent as file descriptors
ALIGNMENT = 64


class Parcel:
    """A batch in anonymous memory: all small tensors pickled together, followed by the pixels."""

    descriptor: int | None = None

    def __init__(self, batch: PackedBatch):
        pixels = batch.pixel_values.contiguous()
        small = pickle.dumps(map_leaves(replace(batch, pixel_values=pixels.new_empty(0)), Tensor, Tensor.numpy))
        self.small, self.dtype, self.shape = len(small), pixels.dtype, tuple(pixels.shape)
        self.start = -(-self.small // ALIGNMENT) * ALIGNMENT
        self.descriptor = os.memfd_create("vtprune-batch")
        os.ftruncate(self.descriptor, self.start + pixels.nbytes)
        with mmap.mmap(self.descriptor, 0) as memory:
            memory[: self.small] = small
            memory[self.start :] = pixels.flatten().view(torch.uint8).numpy().data

    def open(self) -> PackedBatch:
        """The batch; its pixels share the memory that the worker wrote."""
        if self.descriptor is None:
            raise RuntimeError("too many open files in this rank; raise `ulimit -n`")
        memory = mmap.mmap(self.descriptor, 0)
        batch = map_leaves(pickle.loads(memory[: self.small]), np.ndarray, torch.from_numpy)
        count = int(np.prod(self.shape))
        pixels = torch.frombuffer(memory, dtype=self.dtype, count=count, offset=self.start)
        return replace(batch, pixel_values=pixels.view(self.shape))

    def pin_memory(self) -> PackedBatch:
        """The batch in pinned memory; called by the data loader's thread."""
        return self.open().pin_memory()

    def __del__(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)


class Channel:
    """The methods of ``multiprocessing``'s queues and events that ``DataLoader`` uses, implemented by a socket. The
    locks of a queue would stay locked if a process is killed, and their files would remain in ``/dev/shm``."""

    def __init__(self) -> None:
        self.reader, self.writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def put(self, item: Any) -> None:
        parcel = item[1] if isinstance(item, tuple) and isinstance(item[1], Parcel) else None
        descriptors = [] if parcel is None or parcel.descriptor is None else [parcel.descriptor]
        socket.send_fds(self.writer, [ForkingPickler.dumps(item)], descriptors)

    def get(self, timeout: float | None = None) -> Any:
        if not self.is_set(timeout):
            raise queue.Empty
        message, descriptors, _, _ = socket.recv_fds(self.reader, MESSAGE, 1)
        item = pickle.loads(message)
        if isinstance(item, tuple) and isinstance(item[1], Parcel):
            item[1].descriptor = descriptors[0] if descriptors else None
        return item

    def set(self) -> None:
        self.put(None)

    def is_set(self, timeout: float | None = 0) -> bool:
        poll = select.poll()
        poll.register(self.reader, select.POLLIN)
        return bool(poll.poll(None if timeout is None else 1000 * timeout))

    def close(self) -> None:
        self.reader.close()
        self.writer.close()

    def cancel_join_thread(self) -> None:
        """Do nothing: a channel has no feeder thread."""


class WorkerContext(ForkServerContext):
    """Starts the workers of one data loader and lists them in ``processes``."""

    def __init__(self) -> None:
        super().__init__()
        self.processes: list[BaseProcess] = []

    def Process(self, **options: Any) -> BaseProcess:  # type: ignore[override]  # noqa: N802
        self.processes.append(ForkServerProcess(**options))
        return self.processes[-1]

    def Queue(self, maxsize: int = 0) -> Channel:  # type: ignore[override]  # noqa: N802
        return Channel()

    def Event(self) -> Channel:  # type: ignore[override]  # noqa: N802
        return Channel()
