"""Compiled layers: ``torch.compile`` around the forward of every decoder and tower layer, inside activation
checkpointing.

Compilation has to happen inside activation checkpointing: torch.utils.checkpoint disables the compiler for its function
if there is a graph break inside, and packed attention is a graph break. So each layer's class is replaced by a subclass
with a compiled ``forward``; transformers checkpoints it like any other layer.
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
# Recompile limit: one function has variants for train/eval, recomputation, decoder and tower. With PyTorch's default of
# 8 it would fall back to eager with only a warning.
RECOMPILE_LIMIT = 32


class _Eager(threading.local):
    """Thread-local ids of layers that currently run eagerly."""

    layers: frozenset[int] = frozenset()


_EAGER = _Eager()


def compile_layers(model: HFModule, *, tower: bool = True, backend: str | Callable[..., Any] = "inductor") -> HFModule:
    """Compile the decoder's layers and the vision tower's, in place, for any number of tokens; returns ``model``.

    Compilation happens in the first training step. Later steps do not recompile, regardless of lengths and numbers of
    segments and tiles, except for the first batch with a single tile. Prefill and decoding with a KV cache run eagerly.
    Compiled layers cannot be pickled. ``model`` may be pruned or not, and wrapped by PEFT.

    Raises:
        ValueError: it is compiled already.
    """
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    classes: dict[type[nn.Module], type[nn.Module]] = {}
    for layer in _layers(model, tower):
        if is_compiled(layer):
            raise ValueError(f"{type(layer).__name__} is already compiled; call uncompile_layers(model) first")
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
    """Context manager that runs the compiled layers in ``module`` eagerly in this thread, so that forward hooks on
    their submodules fire (compiled code skips them)."""
    previous = _EAGER.layers
    _EAGER.layers = previous | {id(layer) for layer in module.modules() if is_compiled(layer)}
    try:
        yield
    finally:
        _EAGER.layers = previous


def _compiled_class(base: type[nn.Module], backend: str | Callable[..., Any]) -> type[nn.Module]:
    """Subclass of ``base`` with a compiled forward and the same class name, so that lookups by class name still
    work."""
    compiled = torch.compile(base.forward, dynamic=True, backend=backend)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        caches = kwargs.get("past_key_values") is not None
        return (base.forward if caches or id(self) in _EAGER.layers else compiled)(self, *args, **kwargs)

    return type(base.__name__, (base,), {"forward": forward, BASE: base, "__module__": base.__module__})


def _layers(model: HFModule, tower: bool) -> Iterator[nn.Module]:
    """The transformer blocks: the elements of the longest ModuleList in the decoder and in the vision tower (including
    copies made by PEFT's modules_to_save)."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    family = family_of(inner)
    base = inner.get_submodule(family.base)
    yield from inner.get_submodule(family.decoder).layers
    if tower:
        vision = next(module for name, module in base.named_children() if name in ("vision_tower", "visual"))
        for part in towers(vision).values():
            yield from max((module for module in part.modules() if isinstance(module, nn.ModuleList)), key=len)
