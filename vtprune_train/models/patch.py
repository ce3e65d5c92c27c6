"""The front door: ``prune(model, method)`` and ``unprune(model)``.

Pruning swaps the ``forward`` of four modules of an unmodified Hugging Face model for packed ones. Parameters, names and
classes stay what they were, so checkpoints, optimizers, DeepSpeed's hooks and PEFT see the model they know.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import LlavaNextForConditionalGeneration

from vtprune_train.models import HFModule, llava_next
from vtprune_train.models.attention import PREFIX, choose_backend
from vtprune_train.models.head import chunked_cross_entropy
from vtprune_train.pruning.base import PruningMethod

_STATE = "_vtprune"
CONFIG_KEY = "pruning"


def prune(model: HFModule, method: PruningMethod | None, *, attention: str = "auto") -> HFModule:
    """Let ``model`` drop visual tokens inside its forward pass, in training and evaluation.

    Afterwards ``model(**processor(...))`` takes what it always took and returns loss and logits in the caller's shape
    (:func:`vtprune_train.models.padded.forward`), and ``model(batch)`` takes a
    :class:`~vtprune_train.stream.PackedBatch`. The settings stand in ``model.config.pruning``, so ``save_pretrained``
    keeps them.

    Args:
        model: a ``LlavaNextForConditionalGeneration`` with a Llama, Mistral or Qwen2 language model; changed in place.
        method: for example ``PyramidDrop(layers=(8, 16, 24), keep=(0.5, 0.25, 0.125))``; ``None`` packs without
            dropping.
        attention: ``auto`` (the best for the model's device and dtype, so move it first) or a backend of
            :mod:`vtprune_train.models.attention`.

    Returns:
        ``model``.

    Raises:
        ValueError: the class is not supported, the model is pruned already, or the method does not fit its depth.
    """
    if not isinstance(model, LlavaNextForConditionalGeneration):
        raise ValueError(f"cannot prune a {type(model).__name__}; supported: LlavaNextForConditionalGeneration")
    if is_pruned(model):
        raise ValueError(f"this model is pruned already ({_method_of(model)}); call unprune(model) first")
    text_model = model.model.language_model
    llava_next.check_text_model(text_model)
    if method is not None:
        method.drops(len(text_model.layers))
    weight = model.lm_head.weight
    backend = choose_backend(attention, weight.device, weight.dtype)
    state = {
        "method": method,
        "attention": text_model.config._attn_implementation,
        "pruning": model.config.__dict__.get(CONFIG_KEY),
        "forwards": {},
    }
    replacements: dict[str, Callable[..., Any]] = {
        "": llava_next.forward,
        "model": llava_next.forward_model,
        "model.language_model": partial(llava_next.forward_text, method=method),
        "lm_head": forward_head,
    }
    for name, function in replacements.items():
        module = model.get_submodule(name)
        state["forwards"][name] = module.__dict__.get("forward")
        module.forward = MethodType(function, module)
    text_model.config._attn_implementation = PREFIX + backend
    model.__dict__[_STATE] = state
    if method is not None:
        setattr(model.config, CONFIG_KEY, method.settings())
    elif CONFIG_KEY in model.config.__dict__:
        delattr(model.config, CONFIG_KEY)
    return model


def unprune(model: HFModule) -> HFModule:
    """Undo :func:`prune`: forward functions, attention and config are what they were before.

    Raises:
        ValueError: the model is not pruned.
    """
    if not is_pruned(model):
        raise ValueError(f"this {type(model).__name__} is not pruned, so there is nothing to undo")
    state = model.__dict__.pop(_STATE)
    for name, function in state["forwards"].items():
        module = model.get_submodule(name)
        del module.__dict__["forward"]
        if function is not None:
            module.forward = function
    model.model.language_model.config._attn_implementation = state["attention"]
    if state["pruning"] is not None:
        setattr(model.config, CONFIG_KEY, state["pruning"])
    elif CONFIG_KEY in model.config.__dict__:
        delattr(model.config, CONFIG_KEY)
    return model


def is_pruned(model: HFModule) -> bool:
    """Whether :func:`prune` changed this model and :func:`unprune` has not undone it."""
    return _STATE in model.__dict__


def _method_of(model: HFModule) -> PruningMethod | None:
    return model.__dict__[_STATE]["method"]


def forward_head(self: nn.Linear, hidden: Tensor, targets: Tensor | None = None) -> Any:
    """Logits, or with ``targets`` the chunked cross-entropy; inside the module's own call, where ZeRO-3 has its
    weight gathered."""
    if targets is None:
        return nn.Linear.forward(self, hidden)
    return chunked_cross_entropy(hidden, self.weight, self.bias, targets)
