"""Decode workers: PyTorch's ``DataLoader`` over batches in a fixed order, made again when a worker dies.

Workers are forked from a server, a process of its own without threads or CUDA that has imported what they need. They
share no locks with each other or with the rank: tasks go to a worker and batches come back over sockets that keep
messages whole, a batch as a file descriptor of anonymous memory. So a worker that is killed at any moment leaves
nothing behind in ``/dev/shm``, and blocks nobody.
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

PRELOADED = ["vtprune_train.data.load.collate", "vtprune_train.data.load.workers"]  # by the server
LOOK_SECONDS = 0.25  # between two looks at whether the workers live, while the rank waits for a batch
MOST_DEATHS = 3  # over the same batch
STACK_SECONDS = 5.0
END_SECONDS = 5.0
LIKELY = {
    signal.SIGKILL: "most likely the machine ran out of memory: see the kernel's log, lower data.workers or "
    "data.prefetch",
    signal.SIGBUS: "most likely a file was cut while it was mapped, or memory for batches ran out",
    signal.SIGSEGV: "most likely an image library crashed over an image",
}
_LIVE: weakref.WeakSet[DecodePool] = weakref.WeakSet()


class WorkerError(RuntimeError):
    """Decoding cannot go on; names the worker, the cause and the samples."""


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one rank in one micro-step of ``step``, and whose images they get (their own if ``None``)."""

    step: int
    samples: tuple[int, ...]
    image_samples: tuple[int, ...] | None = None


def start_server() -> None:
    """Start the process that workers are forked from, unless it runs; it imports what they need in the background."""
    forkserver.set_forkserver_preload(PRELOADED)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # else NumPy starts threads in it
    for process in (resource_tracker, forkserver):  # starting the first one unblocks signals
        with signals_blocked():
            process.ensure_running()


def wait_for_server() -> None:
    """Wait until the server has imported what workers need, which takes seconds: what waits for a batch meanwhile would
    count as hung."""
    process = WorkerContext().Process(target=os.getpid)
    process.start()
    process.join()


@dataclass
class _Decoded(Dataset[Any]):
    """A batch or what went wrong, for each task; ``counts`` are the batches that each worker has decoded."""

    decode: Callable[[MicroBatch], PackedBatch]
    counts: Any

    def __getitem__(self, task: MicroBatch) -> Parcel | str:
        worker = get_worker_info()
        assert worker is not None, "runs in workers only"
        try:
            parcel = Parcel(self.decode(task))
        except Exception:
            return traceback.format_exc()[-MESSAGE // 2 :]
        self.counts[worker.id] += 1
        return parcel


def _begin(rank: int, stacks: list[int], worker: int) -> None:
    """The first that a worker does; ``stacks`` are the rank's file descriptors for the stack of each."""
    live_with_parent()
    file = Path(f"/proc/{rank}/fd/{stacks[worker]}").open("ab")  # noqa: SIM115 (open as long as it lives)
    faulthandler.enable(file)
    faulthandler.register(signal.SIGUSR1, file)


@dataclass(eq=False)
class DecodePool:
    """Batches of ``tasks`` in order, decoded by ``workers`` processes that take turns.

    Args:
        decode: makes a batch; is pickled, and runs in the workers.
        prefetch: batches that each worker is given ahead.
        timeout: seconds to wait for a batch before its worker counts as hung; ``None`` waits for ever.
        names: the samples of a task, for messages.
        pin: into pinned memory, by a thread of the loader.

    ``ready`` counts the batches that lay decoded when the last one was asked for.
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
        self.owed: deque[MicroBatch] = deque()  # given to workers and not delivered yet
        self.delivered = self.ready = 0
        self._deaths: Counter[int] = Counter()  # by the number of the batch
        self.processes: list[BaseProcess] = []
        self._stacks: list[int] = []
        self._batches: Iterator[Any] = iter(())
        _LIVE.add(self)
        self._start()

    def next(self) -> PackedBatch | None:
        """The next batch; ``None`` after the last.

        Raises:
            WorkerError: a worker hangs, fails, or dies again and again over the same samples.
        """
        began = time.monotonic()
        self.ready = sum(self._counts) - (self.delivered - self._first)
        while isinstance(item := self._look(), RuntimeError):
            ended = [number for number, process in enumerate(self.processes) if process.exitcode is not None]
            if ended:
                self._restart(ended[0])
            elif "timed out" not in str(item):
                raise WorkerError(f"the data loader of rank {self.rank} failed: {item}") from item
            elif self.timeout is not None and time.monotonic() - began > self.timeout:
                raise self._hung()
        if item is None:
            return None
        if isinstance(item, str):
            who = self._who((self.delivered - self._first) % self.workers)
            raise WorkerError(f"{who} failed over {self._samples(self.owed[0])}:\n{item}")
        self.owed.popleft()
        self.delivered += 1
        return item.open() if isinstance(item, Parcel) else item

    def close(self) -> None:
        """End all workers; they hold nothing that must be finished."""
        self.processes = [process for process in self.processes if process.pid]  # those that have started
        for process in self.processes:
            process.kill()
        self._batches = iter(())  # the loader's own clean-up, which is quick now
        for process in self.processes:
            process.join(END_SECONDS)
            if process.exitcode is None:
                log.warning("process %d does not end; a file system may be hanging", process.pid)
        for file in self._stacks:
            os.close(file)
        self._stacks, self.processes = [], []

    def stacks(self) -> str:
        """Where every worker stands."""
        living = [number for number, process in enumerate(self.processes) if process.pid and process.exitcode is None]
        return "\n".join(self._who(number) + self._stack_of(number) for number in living)

    def _start(self) -> None:
        """A loader from the next batch to deliver on."""
        context = WorkerContext()
        self.processes = context.processes
        self._first, self._counts = self.delivered, context.RawArray("q", self.workers)
        self._stacks = [os.memfd_create("vtprune-stack") for _ in range(self.workers)]
        again, self.owed = self.owed, deque()
        loader = DataLoader(
            _Decoded(self.decode, self._counts),
            batch_size=None,
            sampler=self._given(chain(again, self.tasks)),  # type: ignore[arg-type]  # any iterable will do
            num_workers=self.workers,
            prefetch_factor=self.prefetch,
            timeout=LOOK_SECONDS,
            pin_memory=self.pin,
            worker_init_fn=partial(_begin, os.getpid(), self._stacks),
            multiprocessing_context=context,
            generator=torch.Generator(),  # else it draws a number from the rank's
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

    def _given(self, tasks: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        for task in tasks:
            self.owed.append(task)
            yield task

    def _look(self) -> Any:
        """The loader's next item, ``None`` after the last; the error where it has none yet or a worker died."""
        try:
            return next(self._batches, None)
        except RuntimeError as error:
            return error.with_traceback(None)  # which would keep the loader

    def _restart(self, number: int) -> None:
        """Name the worker that ended and start all again."""
        batch = self._first + self._counts[number] * self.workers + number
        owed = list(self.owed)[batch - self.delivered :]
        over = self._samples(owed[0]) if owed else "nothing"
        end = _end_of(self.processes[number].exitcode)
        what = f"{self._who(number)} {end} while decoding {over}{self._said(number)}"
        self._deaths[batch] += 1
        if self._deaths[batch] >= MOST_DEATHS:
            raise WorkerError(f"{what}\nIt is the third worker in a row that ends over these samples")
        log.warning("%s\nthe workers are started again; the batches stay the same", what)
        self.close()
        self._start()

    def _hung(self) -> WorkerError:
        """The error for a worker that gives no batch, with its stack."""
        number = (self.delivered - self._first) % self.workers
        return WorkerError(
            f"{self._who(number)} has not finished a batch for data.worker_timeout={self.timeout:g} seconds; it is "
            f"decoding {self._samples(self.owed[0])}. Most likely a file system does not answer; raise "
            f"data.worker_timeout if it is only slow{self._stack_of(number)}"
        )

    def _stack_of(self, number: int) -> str:
        """What a worker answers when it is asked for its stack."""
        process = self.processes[number].pid
        assert process is not None, "it has started"
        os.kill(process, signal.SIGUSR1)
        deadline = time.monotonic() + STACK_SECONDS
        while not self._said(number) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.1)  # to the end of the stack
        return self._said(number) or f"\nIt gives no stack (state {_state(process)})"

    def _said(self, number: int) -> str:
        text = os.pread(self._stacks[number], MESSAGE, 0).decode(errors="replace").rstrip()
        return f"\n{text}" if text else ""

    def _who(self, number: int) -> str:
        return f"decode worker {number} of rank {self.rank} (process {self.processes[number].pid})"

    def _samples(self, task: MicroBatch) -> str:
        return f"samples {', '.join(self.names(task)) or 'of none'}"


def live_stacks() -> str:
    """Where every worker of this process stands."""
    return "\n".join(pool.stacks() for pool in list(_LIVE))


@atexit.register  # before multiprocessing waits for processes that ignore its SIGTERM
def _end_all() -> None:
    for pool in list(_LIVE):
        pool.close()


def _end_of(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code)
    except ValueError:
        return f"was killed by signal {-code}"
    likely = LIKELY.get(name)
    return f"was killed by {name.name}{f' ({likely})' if likely else ''}"


def _state(pid: int) -> str:
    """The kernel's letter: D is a wait for a disk or network file system that no signal ends."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
