"""The command line: ``train.py`` and ``vtprune``, one file per command.

Commands raise ``ValueError`` for what a user can fix; :func:`main` prints its message.
"""

from vtprune_train.cli.commands import main, train_main

__all__ = ["main", "train_main"]
