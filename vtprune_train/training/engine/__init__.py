"""DeepSpeed, and nothing but: no other package imports it or reads its attributes.

:mod:`~vtprune_train.training.engine.engine` has what the rest of the package uses, :mod:`~.start` makes one, and
:mod:`~.private` lists the names that DeepSpeed's documentation does not promise. Nothing here imports
``training.checkpoint``, ``training.loop`` or ``training.faults``, which are built on it.
"""
