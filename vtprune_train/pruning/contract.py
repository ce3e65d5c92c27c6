"""Checks that a method implements the interface correctly; run once when it is attached to a decoder."""

from __future__ import annotations

from collections.abc import Sequence

from vtprune_train.core.stream import Drop
from vtprune_train.pruning.base import PruningMethod, method_name
from vtprune_train.pruning.needs import Needs


def check_method(method: PruningMethod, num_layers: int) -> None:
    """Raise if a method's settings are invalid for a decoder with ``num_layers`` layers, or if a required member is
    missing.

    Raises:
        ValueError: the message names the setting (or the class and the missing member), its value and how to fix it.
    """
    method.drops(num_layers)  # for a combination: incompatible methods
    for part in method.parts:
        place = method_name(type(part))
        drops, key_layers = part.drops(num_layers), part.key_layers(num_layers)
        _check_parts(part, place, bool(drops), bool(key_layers))
        _check_drops(drops, f"{place}: drops({num_layers})", num_layers)
        if wrong := [layer for layer in key_layers if not 0 <= layer < num_layers]:
            raise ValueError(
                f"{place}: key_layers({num_layers}) returned layer {wrong[0]}, which does not exist; use 0 to "
                f"{num_layers - 1}"
            )


def _check_parts(part: PruningMethod, place: str, drops: bool, chooses_keys: bool) -> None:
    """Check that a class defines where it acts, what it keeps there, and what it needs from the loop."""

    def lacks(*names: str) -> bool:
        return all(getattr(type(part), name) is getattr(PruningMethod, name) for name in names)

    if not isinstance(part.needs, Needs):
        raise ValueError(f"{place}: needs is {part.needs!r}; it must be a property that returns Needs(...)")
    if lacks("drops", "key_layers"):
        raise ValueError(f"{place} must implement drops(num_layers) or key_layers(num_layers)")
    if drops and lacks("score", "choose"):
        raise ValueError(f"{place} drops tokens but implements neither score(candidates) nor choose(candidates)")
    if chooses_keys and lacks("keys"):
        raise ValueError(f"{place} has key_layers but does not implement keys(layer, ranking, boundary)")


def _check_drops(drops: Sequence[Drop], what: str, num_layers: int) -> None:
    """Check that drops are in ascending order, within the decoder, and have keep ratios in [0, 1]."""
    if not isinstance(drops, tuple | list) or not all(isinstance(drop, Drop) for drop in drops):
        raise ValueError(f"{what} must return a tuple of Drop(layer, keep), not {drops!r}")
    for drop in drops:
        if not 0 <= drop.layer < num_layers:
            raise ValueError(f"{what}: layer {drop.layer} does not exist; use 0 to {num_layers - 1}")
        if not 0 <= drop.keep <= 1:
            raise ValueError(f"{what}: keep={drop.keep} before layer {drop.layer} must be between 0 and 1")
    layers = [drop.layer for drop in drops]
    if layers != sorted(layers):
        raise ValueError(f"{what}: layers {layers} must be in ascending order")
