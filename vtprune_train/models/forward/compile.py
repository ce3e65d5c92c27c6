"""Compiled layers: ``torch.compile`` around the forward of every decoder and tower layer, inside activation
checkpointing.

A layer cannot be compiled from outside its checkpoint: ``torch.utils.checkpoint`` switches the compiler off for the
function that it runs, unless there is no graph break inside, and the packed attention is one. So each layer gets a
subclass of its own class whose ``forward`` is compiled; transformers checkpoints around it as around any other.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from vtprune_train.models import HFModule
from vtprune_train.models.families import family_of
from vtprune_train.models.forward.tower_attention import towers

BASE = "_vtprune_compiled_base"
# Variants of one function: training and evaluation, with and without recomputation, decoder and tower. PyTorch's own
# limit of 8 would fall back to eager, with a warning alone.
RECOMPILE_LIMIT = 32


class _Eager(threading.local):
    """Ids of the layers that run without compilation, in each thread for itself."""

    layers: frozenset[int] = frozenset()


_EAGER = _Eager()


def compile_layers(model: HFModule, *, tower: bool = True, backend: str | Callable[..., Any] = "inductor") -> HFModule:
    """Compile the decoder's layers and the vision tower's, in place, for any number of tokens; returns ``model``.

    The first training step compiles; later ones do not, whatever the lengths and the number of segments and tiles,
    except for the first batch with a single tile. Passes that fill a key-value cache, and decoding, run without
    compilation. Compiled layers cannot be pickled. ``model`` may be pruned or not, and wrapped by PEFT.

    Raises:
        ValueError: it is compiled already.
    """
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    classes: dict[type[nn.Module], type[nn.Module]] = {}
    for layer in _layers(model, tower):
        if is_compiled(layer):
            raise ValueError(f"a {type(layer).__name__} is compiled already; call uncompile_layers(model) first")
        base = type(layer)
        if base not in classes:
            classes[base] = _compiled_class(base, backend)
        layer.__class__ = classes[base]
    return model


def uncompile_layers(model: HFModule) -> HFModule:
    """Undo :func:`compile_layers`."""
    for layer in _layers(model, tower=True):
        layer.__class__ = getattr(layer, BASE, type(layer))
    return model


def is_compiled(layer: nn.Module) -> bool:
    """Whether :func:`compile_layers` changed this layer."""
    return hasattr(layer, BASE)


@contextlib.contextmanager
def eager(module: nn.Module) -> Iterator[None]:
    """Within it, compiled layers inside ``module`` run without compilation in this thread, so that forward hooks on
    their parts, which compiled code does not see, are called."""
    previous = _EAGER.layers
    _EAGER.layers = previous | {id(layer) for layer in module.modules() if is_compiled(layer)}
    try:
        yield
    finally:
        _EAGER.layers = previous


def _compiled_class(base: type[nn.Module], backend: str | Callable[..., Any]) -> type[nn.Module]:
    """``base`` with a compiled forward. Its name stays, for whoever looks layers up by it."""
    compiled = torch.compile(base.forward, dynamic=True, backend=backend)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        caches = kwargs.get("past_key_values") is not None
        return (base.forward if caches or id(self) in _EAGER.layers else compiled)(self, *args, **kwargs)

    return type(base.__name__, (base,), {"forward": forward, BASE: base, "__module__": base.__module__})


def _layers(model: HFModule, tower: bool) -> Iterator[nn.Module]:
    """The repeated blocks: elements of the longest list of modules in the decoder and in the tower (and in each copy of
    the tower that PEFT trains whole)."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    family = family_of(inner)
    base = inner.get_submodule(family.base)
    yield from inner.get_submodule(family.decoder).layers
    if tower:
        vision = next(module for name, module in base.named_children() if name in ("vision_tower", "visual"))
        for part in towers(vision).values():
            yield from max((module for module in part.modules() if isinstance(module, nn.ModuleList)), key=len)
