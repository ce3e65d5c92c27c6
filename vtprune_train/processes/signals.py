"""Signals that ask a training process to end, heard from its first moment on.

Ctrl-C (SIGINT), SIGTERM and SIGHUP ask for the same: finish the step, save once, end with 128 plus the signal's number.
So does the death of a launcher (:mod:`vtprune_train.processes.launchers`). Nothing is raised into the code that is
running: the request is noted, and a thread does what it leads to, also while the main thread waits inside an extension.
This module is imported before PyTorch is, which takes seconds.
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

# Where ranks have heard different ones, the first of these counts: launchers send SIGTERM because of the others.
STOPPING = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
FINAL_FILE = "VTPRUNE_FINAL_FILE"
NO_CODE = "   "
LAUNCH_USAGE = "vtprune launch [torchrun options] --config FILE [key=value ...]"
POLL_SECONDS = 0.5
BEFORE_TRAINING = "before the first step: nothing to save"


def exit_code(number: int) -> int:
    """The exit code of a process that a signal asked to end, as shells have it: 130, 129, 143."""
    return 128 + number


def make_notes(folder: Path) -> Path:
    """Files for the two codes that a launcher and its ranks tell each other; returns the one for ``FINAL_FILE``. Their
    bytes are there from now on, so that noting a code needs no room on the disk."""
    note = folder / "final"
    for path in (note, asked_file(str(note))):
        path.write_text(NO_CODE)
    return note


def noted(note: Path) -> int | None:
    """The code in one of the files of :func:`make_notes`; ``None`` while there is none."""
    text = note.read_text() if note.exists() else NO_CODE
    return None if text == NO_CODE else int(text)


def note_code(note: Path, code: int) -> None:
    """Write a code over what the file holds."""
    try:
        with note.open("r+") as file:
            file.write(f"{code:{len(NO_CODE)}}")
    except OSError as error:  # someone has cleaned up: the process must end all the same
        with contextlib.suppress(OSError):
            print(f"{note}, which tells the launcher not to start again, cannot be written: {error}", file=sys.stderr)


def final_exit(code: int) -> int:
    """What a rank returns for an end that a restart cannot mend: ``code``, unless the launcher wants it noted."""
    note = os.environ.get(FINAL_FILE)
    if note is None:
        return code
    note_code(Path(note), code)
    return 0 if noted(Path(note)) is not None else code


def asked_file(note: str) -> Path:
    """Where ``vtprune launch`` writes the code of the signal that it has passed on to all ranks of the machine."""
    return Path(note).with_name("asked")


def launcher_was_asked() -> bool:
    """Whether ``vtprune launch`` was asked to end, and has told all ranks of the machine."""
    note = os.environ.get(FINAL_FILE)
    return note is not None and noted(asked_file(note)) is not None


def asked_to_stop() -> bool:
    """Whether the end was noted before this rank began: it was started again, although all is over."""
    note = os.environ.get(FINAL_FILE)
    if note is None:
        return False
    if (asked := noted(asked_file(note))) is not None:
        _note_if_none(note, asked)
    return noted(Path(note)) is not None


def listens(pid: int) -> bool:
    """Whether a process has begun to listen (:meth:`Stop.listen`), by its handler for SIGTERM."""
    path = Path(f"/proc/{pid}/status")
    caught = path.read_text().partition("SigCgt:")[2].split() if path.exists() else []
    return not caught or bool(int(caught[0], 16) & 1 << (signal.SIGTERM - 1))


def leave_before_joining(number: int) -> None:
    """End this rank before it has joined the others. The launcher ends those, unless it told all of them itself."""
    _say(f"{signal.Signals(number).name} {BEFORE_TRAINING}")
    if launcher_was_asked():
        _note_if_none(os.environ[FINAL_FILE], exit_code(number))
        os._exit(0)
    os._exit(exit_code(number))


def _note_if_none(note: str, code: int) -> None:
    if noted(Path(note)) is None:
        note_code(Path(note), code)


class Stop:
    """What this process was asked for.

    Attributes:
        number: the first of ``STOPPING`` that arrived; ``None`` while there was none.
        act: called in a thread with the signal when it arrives; ``None``: the training loop looks at ``number``.
        orphaned: a launcher of this process is gone.
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
        """Note requests from now on; the main thread calls this, as early as it can. Signals that are ignored stay so,
        as SIGHUP under ``nohup``. Returns whether it did not listen before."""
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
        """Listen no more: put back the handlers that :meth:`listen` replaced, for a process that goes on."""
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write)  # the thread ends, after what has arrived
        self._thread.join()
        atexit.unregister(ignore_signals)
        self._forget()

    def train(self) -> None:
        """From now on the loop ends the step it is in and saves."""
        self.act = None

    def end(self) -> None:
        """From now on requests change nothing: this process is ending."""
        self.act = lambda number: None

    def requested(self) -> dict[str, float]:
        """Which signal this rank has noted, as numbers to sum over ranks; :func:`agreed_code` reads the sums."""
        return {f"stop_{number}": float(self.number == number) for number in STOPPING}

    def _note(self, number: int, frame: Any) -> None:
        if self.number is None:
            self.number = number

    def _watch(self, read: int) -> None:
        while True:
            if not select.select([read], [], [], POLL_SECONDS)[0]:
                if not self.orphaned:
                    self._look_for_launchers()
                continue
            if not (arrived := os.read(read, 512)):  # the other end is closed
                os.close(read)
                return
            for number in arrived:
                if number in STOPPING:
                    self._asked(number)

    def _look_for_launchers(self) -> None:
        gone = next((launcher for launcher in self._launchers if not launcher.is_alive()), None)
        if gone is not None:
            self.orphaned = True
            self._asked(signal.SIGTERM, f"{gone}, which started this rank, is gone")

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
    """The exit code that all ranks end with, from the sums of :meth:`Stop.requested`, which are taken out of
    ``totals``; 0 if no rank was asked to end."""
    heard = [number for number in STOPPING if totals.pop(f"stop_{number}") > 0]
    return exit_code(heard[0]) if heard else 0


def ignore_signals() -> None:
    """This process is ending with its code. Without this, Python restores the default handlers while it shuts down,
    and a signal that arrives then kills the process, whatever its code would have been."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def quit_on_signals() -> None:
    """End this process without a traceback; for a launcher that has not started ranks yet."""
    atexit.register(ignore_signals)

    def leave(number: int, frame: Any) -> None:
        os._exit(exit_code(number))

    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)


def _say(text: str) -> None:
    """Once on every machine."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        with contextlib.suppress(OSError):  # nobody may be there to read it
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            print(f"\n{now} {text}", file=sys.stderr, flush=True)


STOP = Stop()
