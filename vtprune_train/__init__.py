"""Training-time acceleration of vision-language models: visual tokens are dropped inside the forward pass.

The front door::

    from vtprune_train import PyramidDrop, prune, unprune

    prune(model, PyramidDrop(layers=(8, 16, 24), keep=(0.5, 0.25, 0.125)))

Every class of :data:`vtprune_train.pruning.METHODS` is found here by its name: ``from vtprune_train import FastV``.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtprune_train.core.stream import Drop
    from vtprune_train.models.families import register_family
    from vtprune_train.models.patch import dense, is_pruned, prune, unprune
    from vtprune_train.pruning.base import PruningMethod
    from vtprune_train.pruning.candidates import Candidates, Selection
    from vtprune_train.pruning.combined import Combined
    from vtprune_train.pruning.methods.pyramiddrop import PyramidDrop

__version__ = "0.1.0"

__all__ = [
    "Candidates",
    "Combined",
    "Drop",
    "PruningMethod",
    "PyramidDrop",
    "Selection",
    "dense",
    "is_pruned",
    "prune",
    "register_family",
    "unprune",
]

# Imported when they are asked for: training processes listen for signals before PyTorch is imported, which takes long.
_PLACES = {
    "vtprune_train.models.patch": ("dense", "is_pruned", "prune", "unprune"),
    "vtprune_train.models.families": ("register_family",),
    "vtprune_train.core.stream": ("Drop",),
    "vtprune_train.pruning.base": ("PruningMethod",),
    "vtprune_train.pruning.candidates": ("Candidates", "Selection"),
    "vtprune_train.pruning.combined": ("Combined",),
}


def __getattr__(name: str) -> Any:
    for module, names in _PLACES.items():
        if name in names:
            return getattr(import_module(module), name)
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    if name[:1].isupper():
        from vtprune_train.pruning import METHODS, method_class

        for method, path in METHODS.items():
            if path.endswith(f":{name}"):
                return method_class(method)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
