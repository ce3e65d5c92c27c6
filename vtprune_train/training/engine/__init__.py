"""The only package that imports DeepSpeed or reads its attributes.

:mod:`~vtprune_train.training.engine.engine` has the ``Engine`` that the rest of the package uses, :mod:`~.start`
creates one, and :mod:`~.private` lists the undocumented names of DeepSpeed that are used. Nothing here imports
``training.checkpoint``, ``training.loop`` or ``training.faults``, which depend on it."""
