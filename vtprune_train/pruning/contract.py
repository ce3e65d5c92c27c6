"""Whether a method keeps its side of the contract, asked once where it meets a decoder."""

from __future__ import annotations

from collections.abc import Sequence

from vtprune_train.core.stream import Drop
from vtprune_train.pruning.base import PruningMethod, method_name
from vtprune_train.pruning.needs import Needs


def check_method(method: PruningMethod, num_layers: int) -> None:
    """Refuse a method whose settings do not fit a decoder of ``num_layers`` layers, or whose class lacks a part.

    Raises:
        ValueError: names the setting, or the class and its part, the value and how to fix it.
    """
    method.drops(num_layers)  # of a combination: what does not go together
    for part in method.parts:
        place = method_name(type(part))
        drops, key_layers = part.drops(num_layers), part.key_layers(num_layers)
        _check_parts(part, place, bool(drops), bool(key_layers))
        _check_drops(drops, f"{place}: drops({num_layers})", num_layers)
        if wrong := [layer for layer in key_layers if not 0 <= layer < num_layers]:
            raise ValueError(f"{place}: key_layers({num_layers}) names layer {wrong[0]}; use 0 to {num_layers - 1}")


def _check_parts(part: PruningMethod, place: str, drops: bool, chooses_keys: bool) -> None:
    """A class defines where it acts, what it keeps there, and what it needs from the loop."""

    def lacks(*names: str) -> bool:
        return all(getattr(type(part), name) is getattr(PruningMethod, name) for name in names)

    if not isinstance(part.needs, Needs):
        raise ValueError(f"{place}: needs is {part.needs!r}; write a property that returns Needs(...)")
    if lacks("drops", "key_layers"):
        raise ValueError(f"{place} does not say where it acts; write its drops(num_layers), or key_layers(num_layers)")
    if drops and lacks("score", "choose"):
        raise ValueError(f"{place} drops tokens but does not say which; write its score(candidates), or choose")
    if chooses_keys and lacks("keys"):
        raise ValueError(f"{place} leaves keys out but does not say which; write its keys(layer, ranking, boundary)")


def _check_drops(drops: Sequence[Drop], what: str, num_layers: int) -> None:
    """Drops are in order, within the decoder, and keep a share."""
    if not isinstance(drops, tuple | list) or not all(isinstance(drop, Drop) for drop in drops):
        raise ValueError(f"{what} is {drops!r}; return a tuple of Drop(layer, keep)")
    for drop in drops:
        if not 0 <= drop.layer < num_layers:
            raise ValueError(f"{what} drops before layer {drop.layer}; use 0 to {num_layers - 1}")
        if not 0 <= drop.keep <= 1:
            raise ValueError(
                f"{what} keeps {drop.keep} before layer {drop.layer}; it is a share of tokens, from 0 to 1"
            )
    layers = [drop.layer for drop in drops]
    if layers != sorted(layers):
        raise ValueError(f"{what} drops before layers {layers}; let them ascend")
