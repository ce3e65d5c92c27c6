"""The attention kernel of a pruned model, chosen for its device and dtype, and again if a trainer moves or casts it."""

from __future__ import annotations

import torch
from torch import nn

from vtprune_train.core.user_code import is_path
from vtprune_train.models import HFModule
from vtprune_train.models.forward.attention import (
    PREFIX,
    attention_name,
    autocast_dtype,
    choose_backend,
    unavailable_because,
)
from vtprune_train.models.forward.calls import State
from vtprune_train.models.forward.linear_attention import layers_that_attend
from vtprune_train.models.forward.tower_attention import TOWER_PREFIX, towers


def decoder_backend(text_model: HFModule, requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend for the head size of the decoder.

    Raises:
        ValueError: ``requested`` is unknown or cannot run here.
    """
    attention = text_model.layers[layers_that_attend(text_model)[0]].self_attn
    return choose_backend(requested, device, dtype, attention.head_dim)


def tower_backend(module: nn.Module, backend: str, dtype: torch.dtype | None = None) -> str:
    """Return the decoder's ``backend`` if it is one of the package's and supports ``dtype`` (by default that of the
    weights) and head size of the vision tower, otherwise the best one that does."""
    tower = next(iter(towers(module).values()))
    sizes = tower.device, dtype or tower.dtype, next(m.head_dim for m in tower.modules() if hasattr(m, "head_dim"))
    takes = not is_path(backend) and unavailable_because(backend, *sizes) is None
    return backend if takes else choose_backend("auto", *sizes)


@torch.compiler.disable
def choose_again(base: HFModule, state: State, device: torch.device) -> None:
    """With ``attention="auto"``, choose the backends for the device and dtype of this pass, if they are not those that
    the current ones were chosen for: transformers' Trainer moves the model to the GPU after ``prune``, and mixed
    precision computes in another dtype than that of the weights."""
    if state.chosen_for is None:
        return
    kind, mixed = device.type, autocast_dtype(device)
    dtype = mixed or base.get_input_embeddings().weight.dtype
    text_config = base.language_model.config
    if state.chosen_for == (kind, dtype) or not str(text_config._attn_implementation).startswith(PREFIX):
        return
    state.chosen_for = kind, dtype
    state.backend = decoder_backend(base.language_model, "auto", device, dtype)
    text_config._attn_implementation = attention_name(state.backend, state.attention)
    if state.family.tower is not None:
        module = base.get_submodule(state.family.tower.removeprefix(f"{state.family.base}."))
        state.tower_backend = tower_backend(module, state.backend, mixed)
        for tower in towers(module).values():
            tower.config._attn_implementation = TOWER_PREFIX + state.tower_backend
