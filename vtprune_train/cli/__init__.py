"""The command line: ``train.py`` and ``vtprune``, one file per command.

Everything here raises ``ValueError``, with how to fix it, for what a user can cause; :func:`main` prints it.
"""

from vtprune_train.cli.commands import main, train_main

__all__ = ["main", "train_main"]
