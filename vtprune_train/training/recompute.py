"""Activation checkpointing: which decoder layers are recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedModel

from vtprune_train.models.families import family_of


def checkpoint_activations(model: PreTrainedModel, layers: Collection[int] | None = None) -> None:
    """Recompute the vision tower's layers and these decoder layers (``None``: all) in the backward pass.

    The tower is always included: it sees every tile whatever is dropped later, and recomputing it costs little beside
    the decoder.
    """
    if hasattr(model, "activation_checkpointing_enable"):  # renamed after transformers 5.17
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if layers is None:
        return
    decoder = model.get_submodule(family_of(model).decoder)
    for index, layer in enumerate(decoder.layers):  # type: ignore[arg-type, union-attr]
        layer.gradient_checkpointing = index in layers
