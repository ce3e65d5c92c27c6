"""A rank that does nothing but wait for its end: what it hears goes to the file it is given."""

import os
import sys
import time
from pathlib import Path

from vtprune_train.processes.signals import STOP


def leave(number: int) -> None:
    Path(f"{sys.argv[-1]}.{os.environ['RANK']}").write_text(str(number))
    os._exit(0)


if __name__ == "__main__":
    STOP.act = leave
    STOP.listen()
    Path(f"{sys.argv[-1]}.up.{os.environ['RANK']}").touch()
    time.sleep(600)
