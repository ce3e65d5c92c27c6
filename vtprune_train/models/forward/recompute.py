"""Activation checkpointing: which decoder layers are recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np
from transformers import PreTrainedModel

from vtprune_train.config.errors import ConfigError
from vtprune_train.core.flops import TYPICAL_TEXT, layers_per_stage, stage_lengths
from vtprune_train.core.stream import Drop
from vtprune_train.models.families import family_of
from vtprune_train.models.families.layout import ImageLayout

Level = Literal["all", "first_stage", "none"] | int


def recomputed_layers(level: Level, tokens: Sequence[int], layers: Sequence[int]) -> list[int]:
    """The decoder layers that ``train.activation_checkpointing=level`` recomputes, ascending.

    Layers with the most tokens come first because their activations are largest; ties go to the earlier layer.

    Args:
        level: ``all``; ``none``; ``first_stage``, all layers that see the most tokens (with PyramidDrop those of the
            first stage, with HiDrop those between entering and the first drop, without drops all layers); or a number
            of layers.
        tokens: [stages] tokens of a sample in each stage.
        layers: [stages] number of decoder layers in each stage; 0 for the stage before a drop at layer 0.

    Raises:
        ConfigError: ``level`` exceeds the number of decoder layers.
    """
    of_layer = np.repeat(tokens, layers)
    if level == "none":
        return []
    if level == "all":
        return list(range(len(of_layer)))
    if level == "first_stage":
        return np.flatnonzero(of_layer == of_layer.max()).tolist()
    if level > len(of_layer):
        raise ConfigError(
            f"train.activation_checkpointing={level}: the decoder has {len(of_layer)} layers; use all, first_stage, "
            f"none or a number up to {len(of_layer)}"
        )
    return sorted(np.argsort(-of_layer, kind="stable")[:level].tolist())


def typical_stages(layout: ImageLayout, drops: Sequence[Drop], num_layers: int) -> tuple[list[int], list[int]]:
    """Tokens of a typical sample in each stage, and the layers of each stage: one image of the family's largest
    resolution with :data:`~vtprune_train.core.flops.TYPICAL_TEXT` text tokens. The ranking of stages by token count
    barely depends on the sample, so the same layers are used for all batches."""
    visual = [max(layout.tokens([size])[0] for size in layout.examples())]
    tokens = stage_lengths(np.array([TYPICAL_TEXT]), np.array(visual), np.array([0]), drops)[0]
    return tokens.tolist(), layers_per_stage(drops, num_layers)


def checkpoint_activations(model: PreTrainedModel, layers: Collection[int] | None = None) -> None:
    """Recompute the vision tower's layers and these decoder layers (``None``: all) in the backward pass.

    The vision tower is always included: it processes every tile regardless of later drops, and recomputing it is cheap
    compared with the decoder.
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
