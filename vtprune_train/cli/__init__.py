"""The command line: ``train.py`` and ``vtprune``, one file per command."""

from vtprune_train.cli.commands import main, train_main

__all__ = ["main", "train_main"]
