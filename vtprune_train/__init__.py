"""Training-time acceleration of vision-language models: visual tokens are dropped inside the forward pass.

The front door::

    from vtprune_train import PyramidDrop, prune, unprune

    prune(model, PyramidDrop(layers=(8, 16, 24), keep=(0.5, 0.25, 0.125)))

Every class of :data:`vtprune_train.pruning.METHODS` is found here by its name: ``from vtprune_train import FastV``.
"""

from typing import Any

from vtprune_train.models.patch import dense, is_pruned, prune, unprune
from vtprune_train.pruning import METHODS, PruningMethod, PyramidDrop, method_class
from vtprune_train.pruning.combined import Combined

__version__ = "0.1.0"

__all__ = ["Combined", "PruningMethod", "PyramidDrop", "dense", "is_pruned", "prune", "unprune"]


def __getattr__(name: str) -> Any:
    """The other methods, imported when they are asked for."""
    for method, path in METHODS.items():
        if path.endswith(f":{name}"):
            return method_class(method)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
