"""``train.py`` with a fault in the worker that decodes ``FAULTY_PICTURE``: ``FAULT`` is killed_once, killed or hung."""

import os
import signal
import sys
import time
from multiprocessing import parent_process
from pathlib import Path

from vtprune_train.cli import train_main
from vtprune_train.data import visuals

load_image = visuals.load_image


def faulty(source, *arguments, **options):
    if Path(source).name == os.environ["FAULTY_PICTURE"] and parent_process() is not None:
        wait_for_a_dead_disk() if os.environ["FAULT"] == "hung" else die()
    return load_image(source, *arguments, **options)


def wait_for_a_dead_disk():
    time.sleep(10_000)


def die():
    mark = Path(os.environ["FAULT_MARK"])
    if os.environ["FAULT"] == "killed" or not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


visuals.load_image = faulty  # workers import this file too
if __name__ == "__main__":
    sys.exit(train_main())
