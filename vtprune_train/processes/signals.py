"""Stop signals of a training process, handled from its start.

Ctrl-C (SIGINT), SIGTERM and SIGHUP have the same effect: finish the step, save once, exit with 128 plus the signal
number. So does the death of a launcher (:mod:`vtprune_train.processes.launchers`). Signal handlers only record the
request, and a thread acts on it, even while the main thread waits inside an extension. This module is imported before
PyTorch, whose import takes seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vtprune_train.processes.launchers import Launcher, launchers_above

# If ranks received different ones, the first of these counts: launchers send SIGTERM because of the others.
STOPPING = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
FINAL_FILE = "VTPRUNE_FINAL_FILE"
NO_CODE = "   "
LAUNCH_USAGE = "vtprune launch [torchrun options] --config FILE [key=value ...]"
POLL_SECONDS = 0.5
BEFORE_TRAINING = "before the first step: nothing to save"


def exit_code(number: int) -> int:
    """Exit code after a stop signal, by the convention of shells: 130, 129, 143."""
    return 128 + number


def make_notes(folder: Path) -> Path:
    """Create the files through which a launcher and its ranks exchange two exit codes; returns the one for
    ``FINAL_FILE``. They have their full size from the start, so that a full disk does not matter later."""
    note = folder / "final"
    for path in (note, asked_file(str(note))):
        path.write_text(NO_CODE)
    return note


def noted(note: Path) -> int | None:
    """Read the code from one of the files of :func:`make_notes`; ``None`` if there is none yet."""
    text = note.read_text() if note.exists() else NO_CODE
    return None if text == NO_CODE else int(text)


def note_code(note: Path, code: int) -> None:
    """Write a code into one of the files of :func:`make_notes`."""
    try:
        with note.open("r+") as file:
            file.write(f"{code:{len(NO_CODE)}}")
    except OSError as error:  # somebody removed it: exit anyway
        with contextlib.suppress(OSError):
            print(f"cannot write {note}, which tells the launcher not to restart: {error}", file=sys.stderr)


def final_exit(code: int) -> int:
    """Exit code of a rank after which a restart is pointless. Under ``vtprune launch`` records it and returns 0."""
    note = os.environ.get(FINAL_FILE)
    if note is None:
        return code
    note_code(Path(note), code)
    return 0 if noted(Path(note)) is not None else code


def asked_file(note: str) -> Path:
    """File in which ``vtprune launch`` records the code of a signal that it forwarded to all ranks of the machine."""
    return Path(note).with_name("asked")


def launcher_was_asked() -> bool:
    """Whether ``vtprune launch`` received a stop signal and forwarded it to all ranks of the machine."""
    note = os.environ.get(FINAL_FILE)
    return note is not None and noted(asked_file(note)) is not None


def asked_to_stop() -> bool:
    """Whether the job had already been stopped when this rank was (re)started."""
    note = os.environ.get(FINAL_FILE)
    if note is None:
        return False
    if (asked := noted(asked_file(note))) is not None:
        _note_if_none(note, asked)
    return noted(Path(note)) is not None


def listens(pid: int) -> bool:
    """Whether a process has called :meth:`Stop.listen`, judging by its handler for SIGTERM."""
    path = Path(f"/proc/{pid}/status")
    caught = path.read_text().partition("SigCgt:")[2].split() if path.exists() else []
    return not caught or bool(int(caught[0], 16) & 1 << (signal.SIGTERM - 1))


def leave_before_joining(number: int) -> None:
    """Exit before this rank has joined the others. The launcher stops the others, unless it forwarded the signal."""
    _say(f"{signal.Signals(number).name} {BEFORE_TRAINING}")
    if launcher_was_asked():
        _note_if_none(os.environ[FINAL_FILE], exit_code(number))
        os._exit(0)
    os._exit(exit_code(number))


def _note_if_none(note: str, code: int) -> None:
    if noted(Path(note)) is None:
        note_code(Path(note), code)


class Stop:
    """Stop requests of this process.

    Attributes:
        number: the first signal of ``STOPPING`` that arrived; ``None`` if none did.
        act: called in a thread when the signal arrives; ``None`` if the training loop checks ``number``.
        orphaned: a launcher of this process has exited.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.number: int | None = None
        self.act: Callable[[int], None] | None = leave_before_joining
        self.orphaned = False
        self._launchers: list[Launcher] = []
        self._listening = self._acted = False

    def listen(self) -> bool:
        """Start recording requests; the main thread calls this as early as possible. Ignored signals stay ignored
        (SIGHUP under ``nohup``). Returns False if it was listening already."""
        if self._listening:
            return False
        self._listening = True
        atexit.register(ignore_signals)
        self._launchers = launchers_above()
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._handlers_before = {number: signal.getsignal(number) for number in STOPPING}
        for number, handler in self._handlers_before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._note)
        self._thread = threading.Thread(target=self._watch, args=(read,), name="stop requests", daemon=True)
        self._thread.start()
        return True

    def restore(self) -> None:
        """Undo :meth:`listen` in a process that continues: restore the previous handlers."""
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write)  # the thread handles what has arrived, then ends
        self._thread.join()
        atexit.unregister(ignore_signals)
        self._forget()

    def train(self) -> None:
        """From now on a request makes the loop finish its step and save."""
        self.act = None

    def end(self) -> None:
        """From now on requests have no effect: this process is exiting."""
        self.act = lambda number: None

    def requested(self) -> dict[str, float]:
        """The recorded signal as numbers to sum over ranks; :func:`agreed_code` reads the sums."""
        return {f"stop_{number}": float(self.number == number) for number in STOPPING}

    def _note(self, number: int, frame: Any) -> None:
        if self.number is None:
            self.number = number

    def _watch(self, read: int) -> None:
        while True:
            if not select.select([read], [], [], POLL_SECONDS)[0]:
                if not self.orphaned:
                    self._check_launchers()
                continue
            if not (arrived := os.read(read, 512)):  # the other end is closed
                os.close(read)
                return
            for number in arrived:
                if number in STOPPING:
                    self._asked(number)

    def _check_launchers(self) -> None:
        dead = next((launcher for launcher in self._launchers if not launcher.is_alive()), None)
        if dead is not None:
            self.orphaned = True
            self._asked(signal.SIGTERM, f"{dead}, which started this rank, has exited")

    def _asked(self, number: int, why: str = "") -> None:
        self._note(number, None)
        if self._acted:
            return
        self._acted = True
        act = self.act  # the main thread may change it meanwhile
        if act is not None:
            if why:
                _say(why)
            act(number)
        else:
            why = why or signal.Signals(number).name
            _say(
                f"{why}: finishing this step and saving. Another signal changes nothing; SIGQUIT or SIGKILL ends at "
                "once, without a checkpoint"
            )


def agreed_code(totals: dict[str, float]) -> int:
    """Common exit code of all ranks, from the sums of :meth:`Stop.requested`, which are removed from ``totals``; 0 if
    no rank received a signal."""
    received = [number for number in STOPPING if totals.pop(f"stop_{number}") > 0]
    return exit_code(received[0]) if received else 0


def ignore_signals() -> None:
    """Ignore stop signals while this process exits. Python restores the default handlers during shutdown, so a signal
    would otherwise kill the process and change its exit code."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def quit_on_signals() -> None:
    """Exit without a traceback on stop signals, in a launcher that has not started ranks yet."""
    atexit.register(ignore_signals)

    def leave(number: int, frame: Any) -> None:
        os._exit(exit_code(number))

    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)


def _say(text: str) -> None:
    """Print once per machine."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        with contextlib.suppress(OSError):  # standard error may be closed
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            print(f"\n{now} {text}", file=sys.stderr, flush=True)


STOP = Stop()
