"""Child processes of a rank: they exit with the rank and leave signals to it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from vtprune_train.processes.signals import STOPPING


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Context manager: child processes start with stop signals blocked, until :func:`live_with_parent` ignores them."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def live_with_parent() -> None:
    """Exit when the parent process exits, even if it is killed, and ignore stop signals: terminals and launchers signal
    every process, but only the rank should react."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for every core already
    threading.Thread(target=_follow_parent, name="parent", daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a process that multiprocessing started"
    parent.join()
    os._exit(1)
