"""What processes that a rank starts have in common: they end with the rank and leave its signals to it."""

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
    """Processes started inside block the signals that ask to stop, until :func:`live_with_parent` ignores them."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def live_with_parent() -> None:
    """End with the process that started this one, even if that is killed, and with nothing else: terminals and
    launchers send their signals to every process, and the rank decides what they lead to."""
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
