"""Faster training and inference of vision-language models: without padding, and with fewer visual tokens.

Pack or prune a model, then train it or generate with it as before::

    from vtprune_train import PyramidDrop, pack, prune, unprune

    pack(model)  # computes no padding; the result stays the same
    unprune(model)
    prune(model, PyramidDrop(layers=(8, 16, 24), keep=(0.5, 0.25, 0.125)))  # drops visual tokens as well
    model.generate(**inputs)

Functions: :func:`pack`, :func:`prune`, :func:`unprune`, :func:`batch_by_tokens`, :func:`dense`, :func:`is_pruned`,
:func:`kept_tokens`, :func:`show`, :func:`register_family`. Methods: :class:`PyramidDrop`, :class:`SparseVLM`, ...
(``vtprune methods`` lists all).

Write a method: subclass :class:`PruningMethod`. See what a model keeps: :func:`kept_tokens`, :func:`show`.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vtprune_train.core.stream import Boundary, Drop
    from vtprune_train.data.trainer_batches import batch_by_tokens
    from vtprune_train.models.families import register_family
    from vtprune_train.models.forward.padded import kept_tokens
    from vtprune_train.models.patch import dense, is_pruned, pack, prune, unprune
    from vtprune_train.pruning.base import PruningMethod
    from vtprune_train.pruning.candidates import Candidates, EncoderSignals, Ranking, Selection
    from vtprune_train.pruning.combined import Combined
    from vtprune_train.pruning.methods.cdpruner import CDPruner
    from vtprune_train.pruning.methods.dart import DART
    from vtprune_train.pruning.methods.divprune import DivPrune
    from vtprune_train.pruning.methods.dycoke import DyCoke
    from vtprune_train.pruning.methods.evs import EVS
    from vtprune_train.pruning.methods.fastv import FastV
    from vtprune_train.pruning.methods.feather import Feather
    from vtprune_train.pruning.methods.fopru import FoPru
    from vtprune_train.pruning.methods.hidrop import HiDrop
    from vtprune_train.pruning.methods.hiprune import HiPrune
    from vtprune_train.pruning.methods.idpruner import IDPruner
    from vtprune_train.pruning.methods.lvlm_csp import LVLMCSP
    from vtprune_train.pruning.methods.plphp import PLPHP
    from vtprune_train.pruning.methods.pool import Pool
    from vtprune_train.pruning.methods.prumerge import PruMerge
    from vtprune_train.pruning.methods.prunevid import PruneVid
    from vtprune_train.pruning.methods.pyramiddrop import PyramidDrop
    from vtprune_train.pruning.methods.random_tokens import Random
    from vtprune_train.pruning.methods.scope import SCOPE
    from vtprune_train.pruning.methods.sparsevlm import SparseVLM
    from vtprune_train.pruning.methods.uniform import Uniform
    from vtprune_train.pruning.methods.victor import Victor
    from vtprune_train.pruning.methods.vidcom2 import VidCom2
    from vtprune_train.pruning.methods.videollm_mod import VideoLLMMoD
    from vtprune_train.pruning.methods.visionzip import VisionZip
    from vtprune_train.pruning.methods.vispruner import VisPruner
    from vtprune_train.pruning.methods.voco import VoCo
    from vtprune_train.pruning.methods.vtc_cls import VTCCLS
    from vtprune_train.pruning.methods.zipvl import ZipVL
    from vtprune_train.pruning.needs import Needs
    from vtprune_train.pruning.setting_types import Share
    from vtprune_train.viz.show import show

__version__ = "0.2.0.dev0"

__all__ = [
    "DART",
    "EVS",
    "LVLMCSP",
    "PLPHP",
    "SCOPE",
    "VTCCLS",
    "Boundary",
    "CDPruner",
    "Candidates",
    "Combined",
    "DivPrune",
    "Drop",
    "DyCoke",
    "EncoderSignals",
    "FastV",
    "Feather",
    "FoPru",
    "HiDrop",
    "HiPrune",
    "IDPruner",
    "Needs",
    "Pool",
    "PruMerge",
    "PruneVid",
    "PruningMethod",
    "PyramidDrop",
    "Random",
    "Ranking",
    "Selection",
    "Share",
    "SparseVLM",
    "Uniform",
    "Victor",
    "VidCom2",
    "VideoLLMMoD",
    "VisPruner",
    "VisionZip",
    "VoCo",
    "ZipVL",
    "batch_by_tokens",
    "dense",
    "is_pruned",
    "kept_tokens",
    "pack",
    "prune",
    "register_family",
    "show",
    "unprune",
]

if not TYPE_CHECKING:  # for a type checker, any name would exist otherwise
    # Names are imported on first use: training processes must listen for signals before PyTorch is imported.
    _MODULES = {
        "core.stream": ("Boundary", "Drop"),
        "data.trainer_batches": ("batch_by_tokens",),
        "models.families": ("register_family",),
        "models.forward.padded": ("kept_tokens",),
        "models.patch": ("dense", "is_pruned", "pack", "prune", "unprune"),
        "pruning.base": ("PruningMethod",),
        "pruning.candidates": ("Candidates", "EncoderSignals", "Ranking", "Selection"),
        "pruning.combined": ("Combined",),
        "pruning.methods.cdpruner": ("CDPruner",),
        "pruning.methods.dart": ("DART",),
        "pruning.methods.hiprune": ("HiPrune",),
        "pruning.methods.idpruner": ("IDPruner",),
        "pruning.methods.scope": ("SCOPE",),
        "pruning.methods.vispruner": ("VisPruner",),
        "pruning.methods.divprune": ("DivPrune",),
        "pruning.methods.dycoke": ("DyCoke",),
        "pruning.methods.evs": ("EVS",),
        "pruning.methods.fastv": ("FastV",),
        "pruning.methods.feather": ("Feather",),
        "pruning.methods.fopru": ("FoPru",),
        "pruning.methods.hidrop": ("HiDrop",),
        "pruning.methods.lvlm_csp": ("LVLMCSP",),
        "pruning.methods.plphp": ("PLPHP",),
        "pruning.methods.pool": ("Pool",),
        "pruning.methods.prumerge": ("PruMerge",),
        "pruning.methods.prunevid": ("PruneVid",),
        "pruning.methods.pyramiddrop": ("PyramidDrop",),
        "pruning.methods.random_tokens": ("Random",),
        "pruning.methods.sparsevlm": ("SparseVLM",),
        "pruning.methods.uniform": ("Uniform",),
        "pruning.methods.victor": ("Victor",),
        "pruning.methods.vidcom2": ("VidCom2",),
        "pruning.methods.videollm_mod": ("VideoLLMMoD",),
        "pruning.methods.visionzip": ("VisionZip",),
        "pruning.methods.voco": ("VoCo",),
        "pruning.methods.vtc_cls": ("VTCCLS",),
        "pruning.methods.zipvl": ("ZipVL",),
        "pruning.needs": ("Needs",),
        "pruning.setting_types": ("Share",),
        "viz.show": ("show",),
    }

    def __getattr__(name):
        for module, names in _MODULES.items():
            if name in names:
                return getattr(import_module(f"{__name__}.{module}"), name)
        if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return [*__all__, "__version__"]
