"""Decode workers: PyTorch's ``DataLoader`` over batches in a fixed order, which is recreated when a worker dies.

Workers are forked from a server process without threads or CUDA that has already imported the modules they need. They
share no locks with each other or with the rank: tasks and batches are sent over sockets that preserve message
boundaries, a batch as a file descriptor of anonymous memory. A worker that is killed therefore leaves nothing in
``/dev/shm`` and blocks no other process.
"""

from __future__ import annotations

import atexit
import faulthandler
import logging
import os
import signal
import time
import traceback
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vtprune_train.core.stream import PackedBatch
from vtprune_train.data.load.transport import MESSAGE, Parcel, WorkerContext
from vtprune_train.processes.children import live_with_parent, signals_blocked

log = logging.getLogger(__name__)

PRELOADED = ["vtprune_train.data.load.collate", "vtprune_train.data.load.workers"]  # modules that the server imports
LOOK_SECONDS = 0.25  # interval of checks that workers are alive, while the rank waits for a batch
MOST_DEATHS = 3  # deaths of workers on the same batch that end training
STACK_SECONDS = 5.0
END_SECONDS = 5.0
LIKELY = {
    signal.SIGKILL: "most likely the machine ran out of memory: see the kernel's log, lower data.workers or "
    "data.prefetch",
    signal.SIGBUS: "most likely a file was truncated while it was mapped, or memory for batches ran out",
    signal.SIGSEGV: "most likely an image library crashed on an image",
}
_LIVE: weakref.WeakSet[DecodePool] = weakref.WeakSet()


class WorkerError(RuntimeError):
    """Raised when decoding cannot continue; names the worker, the cause and the samples."""


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one rank in one micro-step of ``step``; ``image_samples`` are the samples whose images they get,
    ``None`` for their own."""

    step: int
    samples: tuple[int, ...]
    image_samples: tuple[int, ...] | None = None


def start_server() -> None:
    """Start the process that workers are forked from, if it is not running; it imports modules in the background."""
    forkserver.set_forkserver_preload(PRELOADED)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # otherwise NumPy starts threads in it
    for process in (resource_tracker, forkserver):  # starting the first one unblocks signals
        with signals_blocked():
            process.ensure_running()


def wait_for_server() -> None:
    """Wait until the server has imported its modules, which takes seconds; without this, the watchdog may count the
    wait for the first batch as a hang."""
    process = WorkerContext().Process(target=os.getpid)
    process.start()
    process.join()


@dataclass
class _Decoded(Dataset[Any]):
    """The batch of each task, or the traceback of its error; ``counts`` has the number of batches of each worker."""

    decode: Callable[[MicroBatch], PackedBatch]
    counts: Any

    def __getitem__(self, task: MicroBatch) -> Parcel | str:
        worker = get_worker_info()
        assert worker is not None, "must run in a worker process"
        try:
            parcel = Parcel(self.decode(task))
        except Exception:
            return traceback.format_exc()[-MESSAGE // 2 :]
        self.counts[worker.id] += 1
        return parcel


def _begin(rank: int, stacks: list[int], worker: int) -> None:
    """Initialize a worker; ``stacks`` are the rank's file descriptors for the stack traces of the workers."""
    live_with_parent()
    file = Path(f"/proc/{rank}/fd/{stacks[worker]}").open("ab")  # noqa: SIM115 (open for the worker's lifetime)
    faulthandler.enable(file)
    faulthandler.register(signal.SIGUSR1, file)


@dataclass(eq=False)
class DecodePool:
    """Batches of ``tasks`` in order, decoded by ``workers`` processes in turn.

    Args:
        decode: makes a batch; it is pickled and runs in the workers.
        tasks: what to decode.
        workers: number of processes.
        prefetch: batches that each worker decodes ahead.
        timeout: seconds to wait for a batch before its worker counts as hung; ``None`` for no limit.
        names: returns the sample ids of a task, for messages.
        pin: copy batches to pinned memory, in a thread of the loader.

    ``ready`` is the number of decoded batches when the last one was requested.
    """

    decode: Callable[[MicroBatch], PackedBatch]
    tasks: Iterator[MicroBatch]
    workers: int
    prefetch: int
    timeout: float | None
    names: Callable[[MicroBatch], Sequence[str]]
    pin: bool = False

    def __post_init__(self) -> None:
        self.rank = os.environ.get("RANK", "0")
        self.pending: deque[MicroBatch] = deque()  # sent to workers and not delivered yet
        self.delivered = self.ready = 0
        self._deaths: Counter[int] = Counter()  # by batch number
        self.processes: list[BaseProcess] = []
        self._stacks: list[int] = []
        self._batches: Iterator[Any] = iter(())
        _LIVE.add(self)
        self._start()

    def next(self) -> PackedBatch | None:
        """The next batch; ``None`` after the last.

        Raises:
            WorkerError: a worker hangs or fails, or ``MOST_DEATHS`` workers died on the same samples.
        """
        start = time.monotonic()
        self.ready = sum(self._counts) - (self.delivered - self._first)
        while isinstance(item := self._look(), RuntimeError):
            ended = [number for number, process in enumerate(self.processes) if process.exitcode is not None]
            if ended:
                self._restart(ended[0])
            elif "timed out" not in str(item):
                raise WorkerError(f"the data loader of rank {self.rank} failed: {item}") from item
            elif self.timeout is not None and time.monotonic() - start > self.timeout:
                raise self._hung()
        if item is None:
            return None
        if isinstance(item, str):
            who = self._who((self.delivered - self._first) % self.workers)
            raise WorkerError(f"{who} failed on {self._samples(self.pending[0])}:\n{item}")
        self.pending.popleft()
        self.delivered += 1
        return item.open() if isinstance(item, Parcel) else item

    def close(self) -> None:
        """Kill all workers; they have no state to save."""
        self.processes = [process for process in self.processes if process.pid]  # those that have started
        for process in self.processes:
            process.kill()
        self._batches = iter(())  # runs the data loader's own clean-up
        for process in self.processes:
            process.join(END_SECONDS)
            if process.exitcode is None:
                log.warning("process %d does not end; a file system may be hanging", process.pid)
        for file in self._stacks:
            os.close(file)
        self._stacks, self.processes = [], []

    def stacks(self) -> str:
        """The stack traces of all workers."""
        living = [number for number, process in enumerate(self.processes) if process.pid and process.exitcode is None]
        return "\n".join(self._who(number) + self._stack_of(number) for number in living)

    def _start(self) -> None:
        """Create a data loader that starts at the next batch to deliver."""
        context = WorkerContext()
        self.processes = context.processes
        self._first, self._counts = self.delivered, context.RawArray("q", self.workers)
        self._stacks = [os.memfd_create("vtprune-stack") for _ in range(self.workers)]
        repeated, self.pending = self.pending, deque()
        loader = DataLoader(
            _Decoded(self.decode, self._counts),
            batch_size=None,
            sampler=self._send(chain(repeated, self.tasks)),  # type: ignore[arg-type]  # any iterable works
            num_workers=self.workers,
            prefetch_factor=self.prefetch,
            timeout=LOOK_SECONDS,
            pin_memory=self.pin,
            worker_init_fn=partial(_begin, os.getpid(), self._stacks),
            multiprocessing_context=context,
            generator=torch.Generator(),  # otherwise it draws a number from the default generator
        )
        start_server()
        try:
            self._batches = iter(loader)
        except (OSError, EOFError) as error:  # most likely a process was killed while it started
            self._deaths[self.delivered] += 1
            if self._deaths[self.delivered] >= MOST_DEATHS:
                raise WorkerError(f"the decode workers of rank {self.rank} cannot be started: {error}") from error
            self.close()
            self._start()

    def _send(self, tasks: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        for task in tasks:
            self.pending.append(task)
            yield task

    def _look(self) -> Any:
        """The data loader's next item, ``None`` after the last; the error if no batch is ready or a worker died."""
        try:
            return next(self._batches, None)
        except RuntimeError as error:
            return error.with_traceback(None)  # the traceback would keep the loader alive

    def _restart(self, number: int) -> None:
        """Report the worker that ended and restart all workers."""
        batch = self._first + self._counts[number] * self.workers + number
        pending = list(self.pending)[batch - self.delivered :]
        samples = self._samples(pending[0]) if pending else "nothing"
        end = _end_of(self.processes[number].exitcode)
        report = f"{self._who(number)} {end} while decoding {samples}{self._stack_file(number)}"
        self._deaths[batch] += 1
        if self._deaths[batch] >= MOST_DEATHS:
            raise WorkerError(f"{report}\nThis is the third worker that died on these samples")
        log.warning("%s\nthe workers are restarted; the batches stay the same", report)
        self.close()
        self._start()

    def _hung(self) -> WorkerError:
        """The error for a worker that does not return its batch, with its stack trace."""
        number = (self.delivered - self._first) % self.workers
        return WorkerError(
            f"{self._who(number)} has not finished a batch for data.worker_timeout={self.timeout:g} seconds; it is "
            f"decoding {self._samples(self.pending[0])}. Most likely a file system does not respond; raise "
            f"data.worker_timeout if it is only slow{self._stack_of(number)}"
        )

    def _stack_of(self, number: int) -> str:
        """Request the stack trace of a worker."""
        process = self.processes[number].pid
        assert process is not None, "the worker has started"
        os.kill(process, signal.SIGUSR1)
        deadline = time.monotonic() + STACK_SECONDS
        while not self._stack_file(number) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.1)  # until the trace is complete
        return self._stack_file(number) or f"\nNo stack trace is available (state {_state(process)})"

    def _stack_file(self, number: int) -> str:
        """The stack traces that a worker has written so far."""
        text = os.pread(self._stacks[number], MESSAGE, 0).decode(errors="replace").rstrip()
        return f"\n{text}" if text else ""

    def _who(self, number: int) -> str:
        return f"decode worker {number} of rank {self.rank} (process {self.processes[number].pid})"

    def _samples(self, task: MicroBatch) -> str:
        return f"samples {', '.join(self.names(task)) or '(none)'}"


def live_stacks() -> str:
    """The stack traces of all workers of this process."""
    return "\n".join(pool.stacks() for pool in list(_LIVE))


@atexit.register  # before multiprocessing waits for processes that ignore SIGTERM
def _end_all() -> None:
    for pool in list(_LIVE):
        pool.close()


def _end_of(code: int | None) -> str:
    """How a process ended, with the most likely reason."""
    if code is None or code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code)
    except ValueError:
        return f"was killed by signal {-code}"
    likely = LIKELY.get(name)
    return f"was killed by {name.name}{f' ({likely})' if likely else ''}"


def _state(pid: int) -> str:
    """The kernel's state letter; D is an uninterruptible wait for a disk or network file system."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
