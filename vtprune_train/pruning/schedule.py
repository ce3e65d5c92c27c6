"""Schedules: which layers, which ratios. Host only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def quarters(num_layers: int, num_drops: int) -> tuple[int, ...]:
    """``num_drops`` layers that split ``num_layers`` evenly: 8, 16, 24 of 32 for three drops."""
    return tuple(round(num_layers * (i + 1) / (num_drops + 1)) for i in range(num_drops))


def check_schedule(layers: Sequence[int] | None, keep: Sequence[float], num_layers: int | None = None) -> None:
    """Check a drop schedule.

    Raises:
        ValueError: naming the setting, its value and the way out.
    """
    problems = _keep_problems(keep)
    if layers is not None:
        problems += _layer_problems(layers, keep, num_layers)
    if problems:
        raise ValueError("; ".join(problems))


def _keep_problems(keep: Sequence[float]) -> list[str]:
    problems = []
    if outside := [ratio for ratio in keep if not 0.0 < ratio <= 1.0]:
        problems.append(
            f"keep={list(keep)}: {outside[0]} is not in (0, 1]; each entry is the share of tokens that stay"
        )
    if any(later > earlier for earlier, later in pairwise(keep)):
        problems.append(
            f"keep={list(keep)} increases; each entry is a share of the ORIGINAL tokens, so later ones must not be "
            f"larger (for example {sorted(keep, reverse=True)})"
        )
    return problems


def _layer_problems(layers: Sequence[int], keep: Sequence[float], num_layers: int | None) -> list[str]:
    problems = []
    if len(layers) != len(keep):
        problems.append(f"layers={list(layers)} has {len(layers)} entries but keep={list(keep)} has {len(keep)}")
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
