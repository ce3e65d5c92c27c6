"""Training with a fault put into one rank at one step: ``FAULT=kind:rank:step python faulty.py --config ...``.

Only the tests start this; the fault is patched in from outside, and (but for ``always``) only
in the first of several starts.
"""

import ctypes
import errno
import os
import signal
import sys
import time
from pathlib import Path

from vtprune_train.cli import main, train_main
from vtprune_train.training import process
from vtprune_train.training.faults import rank_failures, watchdog
from vtprune_train.training.loop.trainer import Trainer

KIND, RANK, STEP = os.environ["FAULT"].split(":")


def fault() -> None:
    if KIND in ("refuse", "refuse_early"):
        raise ValueError("a file is missing on this machine alone")
    if KIND in ("raise", "always"):
        raise RuntimeError("something in this rank alone")
    if KIND == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if KIND == "hang":
        time.sleep(600)
    if KIND == "hang_in_c":  # no Python runs meanwhile in this thread
        mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)  # zeros: a mutex that is free
        for _ in range(2):  # a signal would end a sleep, but not this wait for itself
            library.pthread_mutex_lock(mutex)
    if KIND == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    if KIND == "full_disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")


def is_now(step: int) -> bool:
    first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    return (first_start or KIND == "always") and os.environ["RANK"] == RANK and step == int(STEP)


def prepare(*arguments, original=process.prepare):
    if is_now(0):
        fault()
    return original(*arguments)


def forward_backward(self, *arguments, original=Trainer._forward_backward):
    if is_now(self.state.step + 1):
        fault()
    return original(self, *arguments)


def join_late(*arguments, original=rank_failures.reach):
    """As on a loaded machine: the failing rank is heard of before the others have joined, and ends after that."""
    if KIND == "refuse_early" and os.environ["RANK"] != RANK:
        time.sleep(2)
    return original(*arguments)


def end_late(*arguments, original=watchdog.end):
    if KIND == "refuse_early" and os.environ["RANK"] == RANK:
        time.sleep(4)
    original(*arguments)


if KIND == "full_disk" and os.environ["RANK"] == RANK:  # the log and torchrun's files are on that disk too
    sys.stderr = Path("/dev/full").open("w")  # noqa: SIM115
    os.environ["TORCHELASTIC_ERROR_FILE"] = "/nowhere/error.json"
watchdog.end = end_late
rank_failures.reach = join_late
process.prepare = prepare
Trainer._forward_backward = forward_backward

if __name__ == "__main__":
    sys.exit(main() if sys.argv[1:2] == ["train"] else train_main())
