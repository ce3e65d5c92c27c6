"""Training as ``train.py`` starts it, with the model built whole under ZeRO-3 too: what sharded runs must equal."""

import sys

import vtprune_train.training.loop.run as run
from vtprune_train.cli import train_main
from vtprune_train.models.io.placement import WHOLE

if __name__ == "__main__":
    run.placement_for = lambda config, settings: WHOLE
    sys.exit(train_main())
