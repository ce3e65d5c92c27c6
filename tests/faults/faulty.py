"""Training with a fault put into one rank at one step: ``FAULT=kind:rank:step python faulty.py --config ...``.

Only the tests start this; the fault is patched in from outside, and only in the first of several starts.
"""

import os
import signal
import sys
import time

from vtprune_train.cli import main, train_main
from vtprune_train.training.trainer import Trainer

KIND, RANK, STEP = os.environ["FAULT"].split(":")


def fault() -> None:
    if KIND == "raise":
        raise RuntimeError("something in this rank alone")
    if KIND == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if KIND == "hang":
        time.sleep(600)


def patched(self, batches, scale, original=Trainer._forward_backward):
    first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if first_start and os.environ["RANK"] == RANK and self.state.step + 1 == int(STEP):
        fault()
    return original(self, batches, scale)


Trainer._forward_backward = patched

if __name__ == "__main__":
    sys.exit(main() if sys.argv[1:2] == ["train"] else train_main())
