"""``vtprune launch`` whose ranks run ``faulty.py``, forked: what is imported already is not imported again."""

import sys
from pathlib import Path

from vtprune_train import launch
from vtprune_train.cli import main

launch.RANK_MODULE = str(Path(__file__).parent / "faulty.py")

if __name__ == "__main__":
    sys.exit(main(["launch", "--run_path", "--start_method", "fork", "--nproc_per_node", "2", *sys.argv[1:]]))
