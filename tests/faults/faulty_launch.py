"""``vtprune launch`` whose ranks run ``faulty.py``."""

import sys

from vtprune_train.cli import launch, main

launch.RANK_MODULE = "faulty"

if __name__ == "__main__":
    sys.exit(main(["launch", "--nproc_per_node", "2", *sys.argv[1:]]))
