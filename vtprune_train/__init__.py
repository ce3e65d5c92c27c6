"""Training-time acceleration of vision-language models: visual tokens are dropped inside the forward pass.

The front door::

    from vtprune_train import PyramidDrop, prune, unprune

    prune(model, PyramidDrop(layers=(8, 16, 24), keep=(0.5, 0.25, 0.125)))
"""

from vtprune_train.models.patch import dense, is_pruned, prune, unprune
from vtprune_train.pruning import PruningMethod, PyramidDrop

__version__ = "0.1.0"

__all__ = ["PruningMethod", "PyramidDrop", "dense", "is_pruned", "prune", "unprune"]
