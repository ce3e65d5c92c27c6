"""Decode workers: processes that make batches in a fixed order, each behind a bounded queue of its own.

Nothing is shared between workers: each has one socket to its rank, over which a batch travels as a file descriptor of
anonymous memory. So a worker that is killed breaks nothing but itself and is replaced, its batches decoded again to the
same bits; /dev/shm is not used, and a worker ends with its rank because the socket closes.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import mmap
import os
import pickle
import select
import signal
import socket
import tempfile
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from vtprune_train.core.stream import PackedBatch, map_leaves

log = logging.getLogger(__name__)

MESSAGE = 65536  # most bytes of a message; batches go by file descriptor
ALIGNMENT = 64
MOST_DEATHS = 3  # in a row, over the same batch
STACK_SECONDS = 5.0
END_SECONDS = 5.0
SENT_TO_ALL = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
_LIVE: weakref.WeakSet[DecodePool] = weakref.WeakSet()
_LIBC = ctypes.CDLL(None)  # loaded here: a forked child should load nothing
LIKELY = {
    signal.SIGKILL: "most likely the machine ran out of memory: see the kernel's log, lower data.workers or "
    "data.prefetch",
    signal.SIGBUS: "most likely a file was cut while it was mapped, or memory for batches ran out",
    signal.SIGSEGV: "most likely an image library crashed over a picture",
}


class WorkerError(RuntimeError):
    """Decoding cannot go on; names the worker, the cause and the samples."""


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one rank in one micro-step of ``step``, and whose pictures they get (their own if ``None``)."""

    step: int
    samples: tuple[int, ...]
    pictures_of: tuple[int, ...] | None = None


@dataclass
class _Worker:
    """A process: the rank's end of its socket, the file of its stacks, what it was given, what of that came back."""

    pid: int
    socket: socket.socket
    stacks: IO[bytes]
    given: deque[MicroBatch] = field(default_factory=deque)
    arrived: deque[_Parcel] = field(default_factory=deque)
    deaths: int = 0
    ended: bool = False


@dataclass
class _Parcel:
    """A batch in anonymous memory: the many small tensors as one string of bytes, then the pixels."""

    memory: mmap.mmap
    small: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @staticmethod
    def send(batch: PackedBatch, connection: socket.socket) -> None:
        pixels = batch.pixel_values.contiguous()
        small = pickle.dumps(map_leaves(replace(batch, pixel_values=pixels.new_empty(0)), Tensor, Tensor.numpy))
        start = _aligned(len(small))
        descriptor = os.memfd_create("vtprune-batch")
        try:
            os.ftruncate(descriptor, start + pixels.nbytes)
            with mmap.mmap(descriptor, 0) as memory:
                memory[: len(small)] = small
                memory[start:] = pixels.flatten().view(torch.uint8).numpy().data
            header = pickle.dumps((len(small), pixels.dtype, tuple(pixels.shape)))
            socket.send_fds(connection, [header], [descriptor])
        finally:
            os.close(descriptor)

    @classmethod
    def received(cls, header: tuple[int, torch.dtype, tuple[int, ...]], descriptor: int) -> _Parcel:
        try:
            return cls(mmap.mmap(descriptor, 0), *header)
        finally:
            os.close(descriptor)

    def open(self) -> PackedBatch:
        """The batch; its pixels stay where the worker wrote them."""
        batch = map_leaves(pickle.loads(self.memory[: self.small]), np.ndarray, torch.from_numpy)
        count = int(np.prod(self.shape))
        pixels = torch.frombuffer(self.memory, dtype=self.dtype, count=count, offset=_aligned(self.small))
        return replace(batch, pixel_values=pixels.view(self.shape))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class DecodePool:
    """Batches of ``tasks`` in order, decoded by ``workers`` processes that take turns.

    Args:
        decode: makes a batch; runs in the workers.
        tasks: what to decode.
        workers: number of processes.
        prefetch: batches that each worker is given ahead.
        timeout: seconds to wait for a batch before its worker counts as hung; ``None`` waits for ever.
        names: the samples of a task, for messages.

    ``ready`` counts the batches that lay decoded when the last one was asked for.
    """

    def __init__(
        self,
        decode: Callable[[MicroBatch], PackedBatch],
        tasks: Iterator[MicroBatch],
        *,
        workers: int,
        prefetch: int,
        timeout: float | None,
        names: Callable[[MicroBatch], Sequence[str]],
    ):
        self.decode, self.tasks, self.timeout, self.names = decode, tasks, timeout, names
        self.workers: list[_Worker] = []
        _LIVE.add(self)
        for number in range(workers):
            self.workers.append(self._start(number))
        self.turn = self.ready = 0
        self.closed = False
        for _ in range(prefetch):
            for worker in self.workers:
                self._give(worker)

    def next(self) -> PackedBatch | None:
        """The next batch; ``None`` behind the last.

        Raises:
            WorkerError: a worker hangs, fails, or dies again and again over the same samples.
        """
        number = self.turn % len(self.workers)
        began = time.monotonic()
        for other in range(len(self.workers)):
            self._look(other, 0)
        self.ready = sum(len(worker.arrived) for worker in self.workers)
        while not (worker := self.workers[number]).arrived:
            if not worker.given:
                return None
            left = None if self.timeout is None else self.timeout - (time.monotonic() - began)
            if left is not None and left <= 0:
                raise self._hung(number)
            self._look(number, left)
        parcel = worker.arrived.popleft()
        worker.given.popleft()
        worker.deaths = 0
        self.turn += 1
        self._give(worker)
        return parcel.open()

    def kill(self) -> None:
        """End all workers; they hold nothing that must be finished. Whoever waits for one gets an error."""
        self.closed = True
        for worker in self.workers:
            if not worker.ended:
                os.kill(worker.pid, signal.SIGKILL)

    def close(self) -> None:
        """End all workers and wait for their end; nobody may wait for one any more."""
        self.kill()
        for worker in self.workers:
            if not worker.ended:
                _end(worker)
            worker.stacks.close()
        self.workers = []

    def _start(self, number: int) -> _Worker:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stacks = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        inherited = [ours, *(worker.socket for worker in self.workers)]
        rank = os.getpid()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SENT_TO_ALL)  # until the worker is ready to ignore them
        pid = os.fork()
        if not pid:
            code = 1
            try:
                for other in inherited:
                    other.close()  # else they would outlive the rank here
                _live_with(rank)
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                _work(self.decode, theirs, stacks)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)  # nothing of the rank's own must be cleaned up here
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        return _Worker(pid, ours, stacks)

    def _give(self, worker: _Worker) -> None:
        task = next(self.tasks, None)
        if task is not None:
            worker.given.append(task)
            _tell(worker, task)

    def _look(self, number: int, seconds: float | None) -> None:
        """Wait for word of a worker and take all that it has sent; a dead one is replaced."""
        worker = self.workers[number]
        poll = select.poll()
        poll.register(worker.socket, select.POLLIN)
        wait = None if seconds is None else 1000 * seconds
        while poll.poll(wait):
            wait = 0
            try:
                message, descriptors, _, _ = socket.recv_fds(worker.socket, MESSAGE, 1)
            except ConnectionResetError:  # it died with tasks unread
                message, descriptors = b"", []
            if not message and self.closed:
                raise WorkerError("the decode workers were ended")
            if not message:
                self._replace(number)
                return
            header = pickle.loads(message)
            if isinstance(header, str):
                task = worker.given[len(worker.arrived)]
                raise WorkerError(f"{self._who(number)} failed over {self._samples(task)}:\n{header}")
            if not descriptors:
                raise WorkerError(f"{self._who(number)}: too many open files in this rank; raise `ulimit -n`")
            worker.arrived.append(_Parcel.received(header, descriptors[0]))

    def _replace(self, number: int) -> None:
        """A worker in place of one that died: it is given what that one still owed."""
        dead = self.workers[number]
        code = _end(dead)
        owed = list(dead.given)[len(dead.arrived) :]
        over = self._samples(owed[0]) if owed else "nothing"
        what = f"{self._who(number)} {_end_of(code)} while decoding {over}{_said(dead.stacks)}"
        deaths = dead.deaths + 1
        if deaths >= MOST_DEATHS:
            raise WorkerError(f"{what}\nIt is the third worker in a row that ends over these samples")
        log.warning("%s\nanother one takes its place; the batches stay the same", what)
        dead.stacks.close()
        fresh = self._start(number)
        fresh.given, fresh.arrived, fresh.deaths = dead.given, dead.arrived, deaths
        self.workers[number] = fresh
        for task in owed:
            _tell(fresh, task)

    def _hung(self, number: int) -> WorkerError:
        """The error for a worker that does not answer, with its stack; the worker is killed."""
        worker = self.workers[number]
        said = _stack_of(worker)
        return WorkerError(
            f"{self._who(number)} has not finished a batch for data.worker_timeout={self.timeout:g} seconds; it is "
            f"decoding {self._samples(worker.given[0])}. Most likely a file system does not answer; raise "
            f"data.worker_timeout if it is only slow{said}"
        )

    def stacks(self) -> str:
        """Where every worker stands."""
        living = [(number, worker) for number, worker in enumerate(self.workers) if not worker.ended]
        return "\n".join(self._who(number) + _stack_of(worker) for number, worker in living)

    def _who(self, number: int) -> str:
        rank, pid = os.environ.get("RANK", "0"), self.workers[number].pid
        return f"decode worker {number} of rank {rank} (process {pid})"

    def _samples(self, task: MicroBatch) -> str:
        return f"samples {', '.join(self.names(task)) or 'of none'}"


def _tell(worker: _Worker, task: MicroBatch) -> None:
    """Send a task; if the worker is dead the next look at it replaces it."""
    try:
        worker.socket.send(pickle.dumps(task))
    except (BrokenPipeError, ConnectionResetError):
        log.debug("a worker is gone; its tasks go to another one")


def _end(worker: _Worker) -> int | None:
    """Close the rank's side of a worker that ends, and wait for that. Its exit code (minus the signal that killed it);
    ``None`` if not even SIGKILL ends it, because it hangs within the kernel."""
    worker.socket.close()
    worker.ended = True
    deadline = time.monotonic() + END_SECONDS
    while not (found := os.waitpid(worker.pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            log.warning("process %d does not end; a file system may be hanging", worker.pid)
            return None
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(found[1])


def _end_of(code: int | None) -> str:
    if code is None:
        return "closed its connection and hangs"
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code)
    except ValueError:
        return f"was killed by signal {-code}"
    likely = LIKELY.get(name)
    return f"was killed by {name.name}{f' ({likely})' if likely else ''}"


def live_stacks() -> str:
    """Where every worker of this process stands."""
    return "\n".join(pool.stacks() for pool in list(_LIVE) if pool.workers)


def _stack_of(worker: _Worker) -> str:
    """What a worker answers when it is asked for its stack."""
    os.kill(worker.pid, signal.SIGUSR1)
    deadline = time.monotonic() + STACK_SECONDS
    while not _said(worker.stacks) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.1)  # to the end of the stack
    return _said(worker.stacks) or f"\nIt gives no stack (state {_state(worker.pid)})"


def _said(stacks: IO[bytes]) -> str:
    text = os.pread(stacks.fileno(), MESSAGE, 0).decode(errors="replace").rstrip()
    return f"\n{text}" if text else ""


def _state(pid: int) -> str:
    """The kernel's letter: D is a wait for a disk or network file system that no signal ends."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _live_with(rank: int) -> None:
    """End with the rank, even if it is killed, and with nothing else. Launchers and schedulers send SIGTERM to every
    process, terminals SIGINT and SIGHUP: the rank answers with a checkpoint, and needs its workers for its step."""
    for number in SENT_TO_ALL:
        signal.signal(number, signal.SIG_IGN)
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != rank:
        os._exit(0)


def _work(decode: Callable[[MicroBatch], PackedBatch], connection: socket.socket, stacks: IO[bytes]) -> None:
    """A worker's life: tasks in, batches out, until the rank closes the connection."""
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, stacks)
    torch.set_num_threads(1)
    while message := _next_message(connection):
        try:
            batch = decode(pickle.loads(message))
        except Exception:
            connection.send(pickle.dumps(traceback.format_exc()[-MESSAGE // 2 :]))
            return
        try:
            _Parcel.send(batch, connection)
        except (BrokenPipeError, ConnectionResetError):
            return


def _next_message(connection: socket.socket) -> bytes:
    try:
        return connection.recv(MESSAGE)
    except ConnectionResetError:
        return b""
