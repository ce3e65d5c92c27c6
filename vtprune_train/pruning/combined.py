"""Several methods one after the other: one before the decoder, a pyramid inside it, keys dropped from the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from pydantic import InstanceOf
from torch import Tensor, nn

from vtprune_train.core.stream import Boundary, Drop
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Ranking
from vtprune_train.pruning.needs import Needs


class Combined(PruningMethod):
    """All ``methods`` in one model. Each one's shares are of the tokens that it finds at its first drop, so budgets
    multiply: a method that keeps a half, then one that keeps a quarter, leave an eighth.

    Raises:
        ValueError: fewer than two methods, or two that want the same thing (the tower's attention, keys of the cache).
    """

    methods: tuple[InstanceOf[PruningMethod], ...]

    name = "combined"

    def __post_init__(self) -> None:
        if len(self.methods) < 2:
            raise ValueError(f"a combination needs at least two methods, not {len(self.methods)}")
        if nested := [method.name for method in self.methods if len(method.parts) > 1]:
            raise ValueError(f"a combination cannot hold another ({nested[0]}); write one list")
        for what, users in (
            ("the vision tower's attention", [m.name for m in self.methods if m.needs.encoder_layers]),
            ("which keys a layer's cache keeps", [m.name for m in self.methods if _chooses_keys(m)]),
        ):
            if len(users) > 1:
                raise ValueError(f"{' and '.join(users)} cannot be combined: both want {what}; leave one out")

    @property
    def parts(self) -> tuple[PruningMethod, ...]:
        return self.methods

    @property
    def needs(self) -> Needs:
        """What the parts need together. Ranking, positions and gradients are each part's own."""
        needs = [method.needs for method in self.methods]
        tower = next((need for need in needs if need.encoder_layers), Needs())
        keys = next((method.needs for method in self.methods if _chooses_keys(method)), Needs())
        return Needs(
            multi_turn="keep_dense" if any(need.multi_turn == "keep_dense" for need in needs) else "drop",
            encoder_layers=tower.encoder_layers,
            encoder_rows=tower.encoder_rows,
            hidden_after=keys.hidden_after,
            hides_front=any(need.hides_front for need in needs),
        )

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        drops = [
            dataclasses.replace(drop, owner=owner)
            for owner, method in enumerate(self.methods)
            for drop in _drops(method, num_layers)
        ]
        drops.sort(key=lambda drop: drop.layer)  # stable: before the same layer the methods act as listed
        _check_returns(self.methods, drops)
        _check_learned(self.methods, drops)
        _check_ranking(self.methods, drops)
        return tuple(drops)

    def key_layers(self, num_layers: int) -> tuple[int, ...]:
        return next((layers for method in self.methods if (layers := method.key_layers(num_layers))), ())

    def keys(self, layer: int, ranking: Ranking, boundary: Boundary) -> Tensor:
        return next(method for method in self.methods if _chooses_keys(method)).keys(layer, ranking, boundary)

    def module(self, hidden: int, num_layers: int) -> nn.Module | None:
        modules = {str(i): m for i, method in enumerate(self.methods) if (m := method.module(hidden, num_layers))}
        return nn.ModuleDict(modules) if modules else None

    def input_share(self, num_layers: int) -> float:
        """Drops of all methods together; keys that one of them leaves out of the cache multiply it."""
        share = super().input_share(num_layers)
        for method in self.methods:
            if _chooses_keys(method):
                share *= method.input_share(num_layers)
        return share

    def for_budget(self, share: float, num_layers: int) -> PruningMethod:
        raise ValueError("a combination has no single setting to fit to a budget; give each of its methods its own")

    @property
    def ratios(self) -> tuple[float, ...]:
        return tuple(ratio for method in self.methods for ratio in method.ratios)

    def eased(self, start: float, progress: float) -> PruningMethod:
        return self._each(lambda method: method.eased(start, progress))

    def settings(self) -> dict[str, Any]:
        return {"method": [method.settings() for method in self.methods]}

    def _each(self, change: Callable[[PruningMethod], PruningMethod]) -> Combined:
        return Combined(tuple(change(method) for method in self.methods))


def _chooses_keys(method: PruningMethod) -> bool:
    return type(method).keys is not PruningMethod.keys


def _drops(method: PruningMethod, num_layers: int) -> tuple[Drop, ...]:
    try:
        return method.drops(num_layers)
    except ValueError as error:
        raise ValueError(f"{method.name}: {error}") from error


def _check_returns(methods: tuple[PruningMethod, ...], drops: list[Drop]) -> None:
    """Refuse a drop by one method while another holds tokens aside that are to come back."""
    for owner, method in enumerate(methods):
        own = [index for index, drop in enumerate(drops) if drop.owner == owner]
        returning = [index for index in own if drops[index].returns]
        if not returning:
            continue
        between = [drop for drop in drops[own[0] : returning[-1]] if drop.owner != owner]
        if between:
            raise ValueError(
                f"{methods[between[0].owner].name} drops before layer {between[0].layer}, where {method.name} holds "
                f"tokens aside (layers {drops[own[0]].layer} to {drops[returning[-1]].layer}); give it layers outside"
            )


def _check_learned(methods: tuple[PruningMethod, ...], drops: list[Drop]) -> None:
    """Refuse a drop by one method among learned tokens that another goes on to tell from the image's own by their
    place: up to that one's last drop (till when what was set aside may return), or anywhere if it chooses keys."""
    for owner, method in enumerate(methods):
        own = [index for index, drop in enumerate(drops) if drop.owner == owner]
        adding = [index for index in own if drops[index].adds]
        if not adding:
            continue
        always = _chooses_keys(method)
        last = len(drops) if always else own[-1]
        for index, drop in enumerate(drops[:last]):
            back = not always and any(other.owner == drop.owner and other.returns for other in drops[index:last])
            if index > adding[0] and drop.owner != owner and not back:
                raise ValueError(
                    f"{methods[drop.owner].name} drops before layer {drop.layer}, where the learned tokens of "
                    f"{method.name} stand among the image's and would go with them; let it act before {method.name} "
                    f"adds them{'' if always else f', or behind layer {drops[last].layer}'}"
                )


def _check_ranking(methods: tuple[PruningMethod, ...], drops: list[Drop]) -> None:
    """Refuse a ranking by the layer before a drop where another drop stands between the two."""
    for earlier, drop in pairwise(drops):
        method = methods[drop.owner]
        if earlier.layer == drop.layer and drop.ranked and method.needs.rank_with == "this_layer":
            raise ValueError(
                f"{method.name} ranks by the layer before layer {drop.layer}, but {methods[earlier.owner].name} drops "
                f"there first; list {method.name} before it, or give one of them another layer"
            )
