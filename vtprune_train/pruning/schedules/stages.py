"""Schedules: which layers, which ratios. Host only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from vtprune_train.core.rounding import floor_of
from vtprune_train.core.stream import Drop, ImageSpan


def quarters(num_layers: int, num_drops: int) -> tuple[int, ...]:
    """``num_drops`` layers that split ``num_layers`` evenly: 8, 16, 24 of 32 for three drops. Rounds half to even: 2,
    3, 4 of 6."""
    return tuple(round(num_layers * (i + 1) / (num_drops + 1)) for i in range(num_drops))


def scaled_layers(published: Sequence[int], published_depth: int, num_layers: int) -> tuple[int, ...]:
    """Scale layer indices published for a decoder of ``published_depth`` layers to one of ``num_layers`` layers,
    rounding half to even.

    Layer 0 stays layer 0; every other stays between 1 and the last layer. In a shallow decoder several may map to the
    same layer; see :func:`one_per_layer`.
    """
    return tuple(
        0 if layer == 0 else min(num_layers - 1, max(1, round(layer * num_layers / published_depth)))
        for layer in published
    )


def earlier(layers: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Move ``layers`` earlier one layer at a time, keeping their proportions; the first stays at layer 1 or later."""
    for first in range(layers[0] - 1, 0, -1):
        moved: list[int] = []
        for layer in layers:
            moved.append(max(moved[-1] + 1 if moved else 1, layer * first // layers[0]))
        yield tuple(moved)


def one_per_layer(drops: Sequence[Drop]) -> tuple[Drop, ...]:
    """Keep only the last (smallest) of several drops of a method at the same layer; returns drops in ascending layer
    order."""
    return tuple(sorted({drop.layer: drop for drop in drops}.values(), key=lambda drop: drop.layer))


def check_layer(setting: str, layer: int, num_layers: int, least: int = 0) -> None:
    """Check a drop layer (counted from 0). Use ``least=1`` if the drop needs attention from an earlier layer.

    Raises:
        ValueError: naming the setting, its value and how to fix it.
    """
    if not least <= layer < num_layers:
        raise ValueError(
            f"{setting}={layer} does not fit a decoder of {num_layers} layers (counted from 0); use a layer from "
            f"{least} to {num_layers - 1}"
        )


def check_schedule(layers: Sequence[int] | None, keep: Sequence[float], num_layers: int | None = None) -> None:
    """Check a drop schedule.

    Raises:
        ValueError: naming the setting, its value and how to fix it.
    """
    problems = _keep_problems(keep)
    if layers is not None:
        problems += _layer_problems(layers, keep, num_layers)
    if problems:
        raise ValueError("; ".join(problems))


def _keep_problems(keep: Sequence[float]) -> list[str]:
    problems = []
    if outside := [ratio for ratio in keep if not 0.0 < ratio <= 1.0]:
        problems.append(f"keep={list(keep)}: {outside[0]} is not in (0, 1]; each entry is a keep ratio")
    if any(later > earlier for earlier, later in pairwise(keep)):
        problems.append(
            f"keep={list(keep)} increases; each entry is relative to the ORIGINAL tokens, so later ones must not be "
            f"larger (for example {sorted(keep, reverse=True)})"
        )
    return problems


def _layer_problems(layers: Sequence[int], keep: Sequence[float], num_layers: int | None) -> list[str]:
    problems = []
    if len(layers) != len(keep):
        problems.append(
            f"layers={list(layers)} has {len(layers)} entries but keep={list(keep)} has {len(keep)}; they must have "
            "the same length"
        )
    if any(later <= earlier for earlier, later in pairwise(layers)):
        problems.append(f"layers={list(layers)} must increase (for example {sorted(set(layers))})")
    if layers and min(layers) < 1:
        problems.append(f"layers={list(layers)}: the first drop comes after at least one layer, so use 1 or more")
    if num_layers is not None and layers and max(layers) >= num_layers:
        problems.append(
            f"layers={list(layers)}: layer {max(layers)} does not exist in a decoder of {num_layers} layers "
            f"(counted from 0); use layers below {num_layers}"
        )
    return problems


class AtLeastOne(Drop):
    """Keeps at least one token of every image that has any: a published count of a few tokens, converted to a keep
    ratio, would otherwise round to zero for a small image."""

    def kept(self, length: int, before: int) -> int:
        return min(before, max(1, floor_of(self.keep, length)))


class OfEachTile(AtLeastOne):
    """Keeps the same share of each tile of an image, and none of the newlines. An image without known tiles, or one of
    which an earlier method dropped tokens, counts as one tile."""

    def kept_of(self, span: ImageSpan, length: int, before: int) -> int:
        tiles = span.tile_tokens if before == span.length else ()
        return sum(self.kept(tokens, tokens) for tokens in tiles) if tiles else self.kept(length, before)
