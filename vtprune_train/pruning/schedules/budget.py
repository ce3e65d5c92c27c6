"""Token budgets: the mean number of visual tokens per layer for a schedule, and fitting a schedule to a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Protocol, Self, TypeVar

from vtprune_train.core.plan import counts_per_stage
from vtprune_train.core.stream import Drop

COUNTED = 100_000  # span length used to measure shares; large enough that rounding is negligible


class Budgeted(Protocol):
    """What a method has to define to be fitted to a budget."""

    @property
    def name(self) -> str: ...

    @property
    def ratios(self) -> tuple[float, ...]: ...

    def with_ratios(self, ratios: Sequence[float]) -> Self: ...

    def input_share(self, num_layers: int) -> float: ...


Method = TypeVar("Method", bound=Budgeted)


def layer_counts(drops: Sequence[Drop], num_layers: int, length: int) -> tuple[list[int], list[int]]:
    """Visual tokens of a span of ``length`` that ENTER each layer, and those that LEAVE each layer.

    A drop before layer L acts on the output of layer L - 1, so the two differ there: SparseVLM's published budgets
    count tokens leaving a layer, while compute depends on tokens entering it.
    """
    counts = [int(stage[0]) for stage in counts_per_stage(drops, [length])]
    edges = [0, *(drop.layer for drop in drops), num_layers]
    entering = [n for n, (first, end) in zip(counts, pairwise(edges), strict=True) for _ in range(first, end)]
    leaving = entering[1:] + entering[-1:]
    return entering, leaving


def mean_input_share(drops: Sequence[Drop], num_layers: int) -> float:
    """Mean over layers of the fraction of visual tokens that enter."""
    return sum(layer_counts(drops, num_layers, COUNTED)[0]) / (COUNTED * num_layers)


def scaled_to_budget(method: Method, share: float, num_layers: int) -> Method:
    """Return ``method`` with all ``keep`` ratios scaled by the factor that makes its input share equal ``share``.

    Raises:
        ValueError: no factor reaches ``share``; the message gives the reachable range.
    """
    build, high = _scaling(method)
    return bisected(build, 0.0, high, share, num_layers)


def first_that_fits(methods: Iterable[Method], share: float, num_layers: int) -> Method:
    """Return the first of ``methods`` (the same method at different layers) that reaches ``share`` while keeping at
    least half of its ``keep`` ratios; if none does, the one that keeps the largest fraction. If the first layers
    already use up the budget, almost nothing is kept after them and the schedule no longer resembles the method.

    Raises:
        ValueError: none can be scaled to ``share``; the message gives the reachable range.
    """
    ranges, fitting = [], []
    for method in methods:
        build, high = _scaling(method)
        least, half, most = (build(factor).input_share(num_layers) for factor in (0.0, 0.5, high))
        ranges += [least, most]
        if least - 1e-4 <= share <= most + 1e-4:
            if half <= share:
                return bisected(build, 0.0, high, share, num_layers)
            fitting.append((least, build, high))
    if not fitting:
        raise ValueError(
            f"budget {share:g} is out of range for {method.name} on {num_layers} layers, which reaches "
            f"{min(ranges):.3f} to {max(ranges):.3f}; choose another budget"
        )
    _, build, high = min(fitting, key=lambda entry: entry[0])
    return bisected(build, 0.0, high, share, num_layers)


def _scaling(method: Method) -> tuple[Callable[[float], Method], float]:
    """Return a function that scales the method's keep ratios by a factor, and the factor at which all tokens are
    kept."""

    def scaled(factor: float) -> Method:
        return method.with_ratios([min(1.0, max(1e-6, ratio * factor)) for ratio in method.ratios])

    return scaled, 1.0 / min(method.ratios)


def bisected(build: Callable[[float], Method], low: float, high: float, share: float, num_layers: int) -> Method:
    """Find x in [low, high] by bisection such that ``build(x)`` has input share ``share``; the share must increase with
    x.

    Raises:
        ValueError: ``share`` is not between the input shares of ``build(low)`` and ``build(high)``.
    """
    least, most = build(low).input_share(num_layers), build(high).input_share(num_layers)
    if not least - 1e-4 <= share <= most + 1e-4:
        name = build(high).name
        raise ValueError(
            f"budget {share:g} is out of range for {name} on {num_layers} layers, which reaches {least:.3f} to "
            f"{most:.3f}; choose other layers or another budget"
        )
    for _ in range(50):
        middle = (low + high) / 2
        if build(middle).input_share(num_layers) < share:
            low = middle
        else:
            high = middle
    return build(high)
