"""Per-rank watchdog thread that detects hangs and terminates the rank when the job must end.

The loop calls :meth:`Watchdog.mark` at every phase of a step. A rank without a new mark for ``train.watchdog_timeout``
seconds queries all ranks (:mod:`vtprune_train.training.faults.rank_failures`); the blocking ranks are reported, every
rank dumps the stacks of its threads and loader workers to ``RUN/watchdog/rank_XXXXX.txt`` and exits with code 124.

The thread needs the GIL. If an extension never releases it, a timer in C (``faulthandler.dump_traceback_later``) dumps
the stacks and exits the process slightly later.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import torch.distributed as dist

from vtprune_train.data.load.workers import live_stacks
from vtprune_train.processes.signals import STOP, final_exit, launcher_was_asked
from vtprune_train.training import distributed as ranks
from vtprune_train.training.faults.rank_failures import REPORT_SECONDS, EndReason, Place, RankConnection

POLL_SECONDS = 0.5
REASON_SECONDS = 60.0  # longer than the hub ever needs; no reply means rank 0 is stopped
CAUSE_SECONDS = 10.0  # grace period for the failed rank to report its error and exit
LINGER_SECONDS = 2.0  # before the other ranks exit: launchers poll once per second and report the first exit
ORPHAN_SECONDS = 600.0  # timeout after the launcher has exited, if train.watchdog_timeout is not set
COMMUNICATION = ("torch/distributed/", "deepspeed/comm/")


class Watchdog:
    """Tracks one rank's progress and terminates it."""

    def __init__(self, connection: RankConnection):
        self.connection = connection
        self.timeout: float | None = None
        self.saving_timeout: float | None = None
        self._marks, self._phase, self._step, self._since = 0, "starting", 0, time.monotonic()
        self._file: Any = None
        self._complained = -1
        self._reason: EndReason | None = None
        self._reason_known, self._others_may_end = threading.Event(), threading.Event()
        self._ending = threading.Lock()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def watch(self, folder: Path, timeout: float | None, saving_timeout: float) -> None:
        """Start hang detection: no mark for ``timeout`` seconds (``saving_timeout`` while saving) counts as a hang.
        Stacks are written to ``folder``; ``kill -USR1`` dumps a rank's stacks at any time."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"rank_{ranks.rank():05d}.txt").open("a")
        faulthandler.register(signal.SIGUSR1, file=self._file, all_threads=True)
        self.timeout, self.saving_timeout = timeout, timeout and max(timeout, saving_timeout)
        self.mark("starting")

    def mark(self, phase: str, step: int | None = None) -> None:
        """Record progress: the rank enters ``phase``; pass ``step`` (current global step, counted from 1) when it
        changes."""
        self._marks += 1
        self._phase, self._since = phase, time.monotonic()
        if step is not None:
            self._step = step

    def close(self) -> None:
        """Shut down normally, after the last collective."""
        self.timeout = self.saving_timeout = None
        self.connection.link.send("bye")
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self.connection.close()
        if self._file is not None:
            faulthandler.unregister(signal.SIGUSR1)
            self._file.close()
            if not Path(self._file.name).stat().st_size:
                Path(self._file.name).unlink()

    def fail(self, error: BaseException, code: int, *, final: bool, message: str, terminated: bool = False) -> NoReturn:
        """Terminate this rank and the job because of ``error``; print ``message`` if this rank is the root cause.

        ``code``: exit code of all ranks. ``final``: a restart would fail in the same way. ``terminated``: the cause is
        SIGTERM, which launchers also send when another rank failed.
        """
        STOP.end()  # launchers send SIGTERM as soon as one rank exits
        summary = _first_lines(f"{type(error).__name__}: {error}")
        inside = _in_collective(error)
        raised_on = getattr(error, "raised_on", None)
        self.connection.link.send(
            "failed", error=summary, where=self.place().where, code=code, final=final, in_collective=inside,
            terminated=terminated, raised_on=raised_on,
        )  # fmt: skip
        self._reason_known.wait(REASON_SECONDS)
        reason = self._reason or EndReason((ranks.rank(),), summary, code, final)
        if ranks.rank() not in reason.failed_ranks:
            self._others_may_end.wait(CAUSE_SECONDS + LINGER_SECONDS)
        with self._ending:
            if ranks.rank() in reason.failed_ranks and not reason.hung:
                _write_error_file(message)
                _print(message)
            elif not reason.text.endswith(summary):  # ranks may raise the same error; print it once
                self._report(reason, broken=message if inside else "")
            end(reason.code, reason.final)

    def place(self) -> Place:
        """Current progress of this rank."""
        where = f"step {self._step}, {self._phase}" if self._step else self._phase
        place = Place(self._marks, where, time.monotonic() - self._since)
        collective, frame = _standing(sys._current_frames(), self._main)
        return replace(place, collective=collective, frame=frame)

    def _watch(self) -> None:
        while True:
            messages = self.connection.poll(POLL_SECONDS)
            while messages:
                message = messages.pop(0)
                kind = message.pop("kind")
                if kind == "done":
                    return
                if kind == "report":
                    self.connection.link.send("place", **asdict(self.place()))
                elif kind == "reason":
                    self.connection.link.keep(messages)
                    self._end_job(EndReason(**{**message, "failed_ranks": tuple(message["failed_ranks"])}))
                elif kind == "gone":
                    self._end_job(EndReason((0,), "rank 0 died without an error (killed? out of host memory?)", 1))
            self._look()

    def _look(self) -> None:
        """Check whether this rank makes progress; reaching this code shows that the GIL is available."""
        limit = self.saving_timeout if self._phase == "saving" else self.timeout
        if limit is None and STOP.orphaned:  # no launcher is left to stop it
            limit = ORPHAN_SECONDS
        if limit is None:
            return
        faulthandler.dump_traceback_later(limit + 3 * REPORT_SECONDS, exit=True, file=self._file)
        if time.monotonic() - self._since > limit and self._complained != self._marks:
            self._complained = self._marks
            self.connection.link.send("stalled", marks=self._marks)

    def _end_job(self, reason: EndReason) -> None:
        """Terminate this rank as part of the job. Failed ranks get time to print their error first."""
        self._reason = reason
        STOP.end()
        if reason.hung:
            self._write_stacks(reason)
        self._reason_known.set()
        if not reason.hung:
            self._await_cause()
        if ranks.rank() not in reason.failed_ranks or reason.hung:
            time.sleep(LINGER_SECONDS)
        self._others_may_end.set()
        with self._ending:
            self._report(reason)
            end(reason.code, reason.final)

    def _await_cause(self) -> None:
        """Wait until the failed ranks have exited."""
        deadline = time.monotonic() + CAUSE_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            kinds = {message["kind"] for message in self.connection.poll(min(left, POLL_SECONDS))}
            if kinds & {"cause_ended", "gone"}:
                return

    def _report(self, reason: EndReason, broken: str = "") -> None:
        """Log why the job ends; done by the failed ranks and the first rank of every machine."""
        place = self.place()
        text = f"rank {ranks.rank()} stops ({place.where}): {reason.text}"
        if reason.hung:
            text = f"watchdog: {reason.text} Stacks: {Path(self._file.name).parent}"
        if broken:
            text += f"\n  observed on this rank: {broken.strip().splitlines()[-1]}"
        _write_error_file(text)
        speaker = 1 if 0 in reason.failed_ranks else 0
        if int(os.environ.get("LOCAL_RANK", "0")) == speaker or ranks.rank() in reason.failed_ranks:
            _print(text)

    def _write_stacks(self, reason: EndReason) -> None:
        """Dump stacks of all threads and loader workers to the rank's file; for a failed rank also to stderr."""
        try:
            self._file.write(f"{reason.text}\nrank {ranks.rank()}: {json.dumps(asdict(self.place()))}\n")
            self._file.flush()
            faulthandler.dump_traceback(file=self._file, all_threads=True)
            self._file.write(f"\n{_worker_stacks()}\n")
            self._file.flush()
        except OSError as error:  # a full disk, for example: exit anyway
            _print(f"cannot write the stacks of rank {ranks.rank()} to {self._file.name}: {error}")
        if ranks.rank() in reason.failed_ranks:
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)


def _worker_stacks() -> str:
    try:
        return live_stacks()
    except (OSError, ValueError) as error:  # a loader that is being closed: exit anyway
        return f"cannot get the stacks of the decode workers: {error}"


def end(code: int, final: bool) -> NoReturn:
    """Exit immediately, without waiting for threads or for destructors that wait for other ranks."""
    for worker in multiprocessing.active_children():
        worker.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(final_exit(code) if final or launcher_was_asked() else code)


def _print(text: str) -> None:
    print(f"\n{text}", file=sys.stderr, flush=True)  # start a new line after a progress bar


def _write_error_file(text: str) -> None:
    """Write the error that torchrun shows for this rank, as an error file of ``torch.distributed.elastic``."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    details = {"py_callstack": text, "timestamp": str(int(time.time()))}
    try:
        Path(path).write_text(json.dumps({"message": {"message": _first_lines(text), "extraInfo": details}}))
    except OSError as error:  # a full disk, for example: exit anyway
        Path(path).unlink(missing_ok=True)  # torchrun cannot parse a partial file
        _print(f"cannot write {path}, torchrun's error file of rank {ranks.rank()}: {error}")


def _first_lines(text: str) -> str:
    return text if len(text) < 2000 else text[:2000] + " ..."


def _in_collective(error: BaseException) -> bool:
    """Whether ``error`` is a communication error, which suggests another rank as root cause."""
    if isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error):
        return True
    step: TracebackType | None = error.__traceback__
    while step is not None:
        if any(part in step.tb_frame.f_code.co_filename for part in COMMUNICATION):
            return True
        step = step.tb_next
    return False


def _standing(frames: dict[int, FrameType], main: int | None) -> tuple[str | None, str]:
    """Return the collective this process is waiting in and the innermost frame of its main thread."""
    collective = None
    for thread, innermost in frames.items():
        if thread == threading.get_ident():
            continue
        names = [
            frame.f_code.co_name
            for frame, _ in traceback.walk_stack(innermost)
            if any(part in frame.f_code.co_filename for part in COMMUNICATION)
        ]
        named = [name for name in names if name not in ("wrapper", "log_wrapper", "wait")]
        if names:
            collective = (named or names)[0]
    if main not in frames:
        return collective, ""
    frame = frames[main]
    return collective, f"{frame.f_code.co_name}, {frame.f_code.co_filename}:{frame.f_lineno}"
