"""Decoders in which only some layers have attention (Qwen3.5): checks drop points and key layers, and adjusts default
drop points. Host only."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from vtprune_train.core.flops import attending_layers
from vtprune_train.core.stream import Drop
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.combined import Combined


def check_attending(method: PruningMethod, config: Any) -> None:
    """Check that a method uses attention only in layers that have it; ``config`` is the text config.

    Raises:
        ValueError: it ranks with, or removes keys from, a layer without attention. The message lists the layers with
            attention and the nearest valid setting.
    """
    attending, num_layers = attending_layers(config), config.num_hidden_layers
    if attending is None:
        return
    for part in method.parts:
        if wrong := sorted(set(part.key_layers(num_layers)) - set(attending)):
            raise ValueError(
                f"{part.name} removes keys in decoder layer {wrong[0]}, which has linear attention: its recurrent "
                f"state has no keys; layers that attend: {_listed(attending)}; use a method that drops tokens instead, "
                "for example pyramiddrop"
            )
        for drop in part.drops(num_layers):
            layer = _ranking_layer(part, drop)
            if layer is not None and layer not in attending:
                valid = _valid(part, num_layers, attending)
                raise ValueError(
                    f"{part.name} drops before layer {drop.layer} and ranks with layer {layer} (rank_with="
                    f"{part.needs.rank_with}), which has linear attention, so there are no queries and keys; layers "
                    f"that attend: {_listed(attending)}; drop before {_listed(valid)}, the nearest is "
                    f"{_nearest(drop.layer, valid)}"
                )


def fitted(method: PruningMethod, config: Any) -> PruningMethod:
    """A copy of ``method`` whose default drop points (``layers`` or ``layer`` left out) are moved to the nearest ones
    that rank with an attention layer; ``config`` is the text config. Layers that the user set are not changed."""
    attending, num_layers = attending_layers(config), config.num_hidden_layers
    if attending is None:
        return method
    if isinstance(method, Combined):
        return dataclasses.replace(method, methods=tuple(fitted(part, config) for part in method.parts))
    names = {field.name for field in dataclasses.fields(method)}
    name = next((name for name in ("layers", "layer") if name in names), None)
    if name is None or getattr(method, name) is not None:
        return method
    ranked = [drop for drop in method.drops(num_layers) if _ranking_layer(method, drop) is not None]
    if all(_ranking_layer(method, drop) in attending for drop in ranked):
        return method
    layers = _moved([drop.layer for drop in ranked], _valid(method, num_layers, attending))
    if layers is None:
        return method
    # The setting is the layer before which tokens are dropped, or (SparseVLM) the layer that ranks.
    for shift in (0, -1):
        moved = [layer + shift for layer in layers]
        try:
            changes: dict[str, Any] = {name: tuple(moved) if name == "layers" else moved[0]}
            changed = dataclasses.replace(method, **changes)
            check_attending(changed, config)
        except ValueError:  # the original method is checked next, with a message about the user's settings
            continue
        return changed
    return method


def _ranking_layer(part: PruningMethod, drop: Drop) -> int | None:
    """The layer whose attention ranks at a drop point; ``None`` if none does."""
    if part.needs.rank_with is None or not drop.ranked:
        return None
    return drop.layer if part.needs.rank_with == "next_layer" else drop.layer - 1


def _valid(part: PruningMethod, num_layers: int, attending: Collection[int]) -> list[int]:
    """The layers before which ``part`` can drop."""
    shift = 0 if part.needs.rank_with == "next_layer" else 1
    return [layer + shift for layer in sorted(attending) if 1 <= layer + shift < num_layers]


def _nearest(layer: int, valid: Sequence[int]) -> int:
    return min(valid, key=lambda other: (abs(other - layer), other))


def _moved(layers: Sequence[int], valid: Sequence[int]) -> list[int] | None:
    """The nearest increasing layers among ``valid``; ``None`` if there are too few."""
    if not layers or len(layers) > len(valid):
        return None
    return list(_increasing(layers, valid))


def _increasing(layers: Sequence[int], valid: Sequence[int]) -> Iterator[int]:
    first = 0
    for index, layer in enumerate(layers):
        last = len(valid) - (len(layers) - index)  # leaves one for each later layer
        chosen = _nearest(layer, valid[first : last + 1])
        first = valid.index(chosen) + 1
        yield chosen


def _listed(layers: Collection[int]) -> str:
    return ", ".join(map(str, sorted(layers)))
