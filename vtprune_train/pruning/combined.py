"""Combinations of methods, for example one before the decoder, one between decoder layers, and one on the KV cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import islice, pairwise
from typing import Any, Self

from pydantic import InstanceOf
from torch import Tensor, nn

from vtprune_train.core.flops import TowerGeometry
from vtprune_train.core.stream import Boundary, Drop
from vtprune_train.pruning.base import Per, PruningMethod
from vtprune_train.pruning.candidates import Ranking
from vtprune_train.pruning.needs import Needs
from vtprune_train.pruning.schedules.budget import scaled_to_budget


class Combined(PruningMethod):
    """Apply all ``methods`` to one model. Each method's keep ratios are relative to the tokens present at its first
    drop, so they multiply: keeping 1/2 and then 1/4 leaves 1/8 of the tokens.

    ``per`` is that of all methods.

    Raises:
        ValueError: fewer than two methods, two with different ``per``, or two that need the same exclusive resource
            (vision-tower attention or KV-cache keys).
    """

    methods: tuple[InstanceOf[PruningMethod], ...]

    name = "combined"

    def __post_init__(self) -> None:
        if len(self.methods) < 2:
            raise ValueError(f"a combination needs at least two methods, got {len(self.methods)}")
        if nested := [method.name for method in self.methods if len(method.parts) > 1]:
            raise ValueError(f"combinations cannot be nested ({nested[0]}); put all methods into one list")
        for what, users in (
            ("the vision tower's attention", [m.name for m in self.methods if m.needs.encoder_layers]),
            ("the vision tower (its attention or its tokens)", _users_of_changed_tower(self.methods)),
            ("the choice of keys to keep in the key-value cache", [m.name for m in self.methods if _chooses_keys(m)]),
        ):
            if len(users) > 1:
                raise ValueError(f"{' and '.join(users)} cannot be combined because both use {what}; remove one")
        object.__setattr__(self, "per", _common_per(self.methods, self.per))

    @property
    def parts(self) -> tuple[PruningMethod, ...]:
        return self.methods

    @property
    def needs(self) -> Needs:
        """Merged needs of all parts, except ranking, positions and gradients, which the loop reads from each part."""
        needs = [method.needs for method in self.methods]
        tower = next((need for need in needs if need.encoder_layers), Needs())
        keys = next((method.needs for method in self.methods if _chooses_keys(method)), Needs())
        return Needs(
            multi_turn="keep_dense" if any(need.multi_turn == "keep_dense" for need in needs) else "drop",
            encoder_layers=tower.encoder_layers,
            encoder_rows=tower.encoder_rows,
            encoder_heads=tower.encoder_heads,
            encoder_features=any(need.encoder_features for need in needs),
            merges_features=any(need.merges_features for need in needs),
            class_features=any(need.class_features for need in needs),
            question=any(need.question for need in needs),
            tower=next((need.tower for need in needs if need.tower is not None), None),
            hidden_after=keys.hidden_after,
            hides_front=any(need.hides_front for need in needs),
        )

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        drops = [
            dataclasses.replace(drop, owner=owner)
            for owner, method in enumerate(self.methods)
            for drop in _drops(method, num_layers)
        ]
        drops.sort(key=lambda drop: drop.layer)  # stable sort: methods that drop at the same layer act in list order
        _check_frames(self.methods, drops)
        _check_tower(self.methods, drops)
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

    def tower_module(self, tower: TowerGeometry) -> nn.Module | None:
        modules = {str(i): m for i, method in enumerate(self.methods) if (m := method.tower_module(tower))}
        return nn.ModuleDict(modules) if modules else None

    def input_share(self, num_layers: int) -> float:
        """Input share of all drops together, multiplied by the kept-key share if one method prunes the cache."""
        share = super().input_share(num_layers)
        for method in self.methods:
            if _chooses_keys(method):
                share *= method.input_share(num_layers)
        return share

    def for_budget(self, share: float, num_layers: int) -> PruningMethod:
        """Scales the keep ratios of all methods by one factor, so their proportions stay the same while none is 1."""
        if not self.ratios:
            raise ValueError("no method of this combination has keep ratios to scale; set the budget of each method")
        return scaled_to_budget(self, share, num_layers)

    @property
    def ratios(self) -> tuple[float, ...]:
        return tuple(ratio for method in self.methods for ratio in method.ratios)

    def with_ratios(self, ratios: Sequence[float]) -> Self:
        rest = iter(ratios)
        methods = [(method, list(islice(rest, len(method.ratios)))) for method in self.methods]
        return dataclasses.replace(self, methods=tuple(m.with_ratios(own) if own else m for m, own in methods))

    def eased(self, start: float, progress: float) -> PruningMethod:
        return self._each(lambda method: method.eased(start, progress))

    def settings(self) -> dict[str, Any]:
        return {"method": [method.settings() for method in self.methods]}

    def _each(self, change: Callable[[PruningMethod], PruningMethod]) -> Combined:
        return Combined(tuple(change(method) for method in self.methods))


def _common_per(methods: tuple[PruningMethod, ...], per: Per) -> Per:
    """The ``per`` of all methods, which must be equal because all methods see the same spans; ``per`` is the
    combination's."""
    different = [method for method in methods if method.per != methods[0].per]
    if different:
        raise ValueError(
            f"{methods[0].name} has per={methods[0].per} and {different[0].name} has per={different[0].per}, but all "
            "methods of a combination divide videos in the same way; set the same per for each of them"
        )
    if per == "frame" != methods[0].per:
        raise ValueError(f"per={per} is set for a combination; set it for each of its methods instead")
    return methods[0].per


def _chooses_keys(method: PruningMethod) -> bool:
    return type(method).keys is not PruningMethod.keys


def _users_of_changed_tower(methods: tuple[PruningMethod, ...]) -> list[str]:
    """The methods that change or read the vision tower, if one of them changes its tokens."""
    changed = any(method.needs.tower is not None for method in methods)
    return [method.name for method in methods if changed and method.needs.from_tower]


def _drops(method: PruningMethod, num_layers: int) -> tuple[Drop, ...]:
    try:
        return method.drops(num_layers)
    except ValueError as error:
        raise ValueError(f"{method.name}: {error}") from error


def _check_frames(methods: tuple[PruningMethod, ...], drops: list[Drop]) -> None:
    """Reject a method that compares the frames of videos after another drop, which leaves frames incomplete."""
    for index, drop in enumerate(drops):
        before = [other for other in drops[:index] if other.owner != drop.owner]
        if drop.compares_frames and before:
            name, other = methods[drop.owner].name, methods[before[0].owner].name
            same = f"list {name} first" if before[0].layer == drop.layer else f"let {name} drop first"
            raise ValueError(
                f"{name} compares whole frames of a video, but {other} drops tokens before it (before layer "
                f"{before[0].layer}); {same}" + (", or remove one of them" if before[0].compares_frames else "")
            )


def _check_tower(methods: tuple[PruningMethod, ...], drops: list[Drop]) -> None:
    """Reject a drop before that of a method that merges tokens inside the vision tower, whose tokens all patches of a
    group still repeat."""
    first = methods[drops[0].owner] if drops else None
    for method in methods:
        if method.needs.tower is not None and first is not None and method is not first:
            raise ValueError(
                f"{method.name} changes the vision tower's tokens, so no method may drop before it, but {first.name} "
                f"drops before layer {drops[0].layer}; list {method.name} first"
            )


def _check_returns(methods: tuple[PruningMethod, ...], drops: list[Drop]) -> None:
    """Reject a drop by one method while another has tokens set aside."""
    for owner, method in enumerate(methods):
        indices = [index for index, drop in enumerate(drops) if drop.owner == owner]
        returning = [index for index in indices if drops[index].returns]
        if not returning:
            continue
        between = [drop for drop in drops[indices[0] : returning[-1]] if drop.owner != owner]
        if between:
            raise ValueError(
                f"{methods[between[0].owner].name} drops tokens before layer {between[0].layer}, but {method.name} has "
                f"tokens set aside in layers {drops[indices[0]].layer} to {drops[returning[-1]].layer}; move the drop "
                "outside those layers"
            )


def _check_learned(methods: tuple[PruningMethod, ...], drops: list[Drop]) -> None:
    """Reject a drop by one method while another method's learned tokens are in the image span, because the latter
    identifies them by position. This holds until the latter's last drop, or for all later layers if it prunes keys or
    its learned tokens stay."""
    for owner, method in enumerate(methods):
        indices = [index for index, drop in enumerate(drops) if drop.owner == owner]
        adding = [index for index in indices if drops[index].adds]
        if not adding:
            continue
        always = _chooses_keys(method) or drops[indices[-1]].adds
        last = len(drops) if always else indices[-1]
        for index, drop in enumerate(drops[:last]):
            back = not always and any(other.owner == drop.owner and other.returns for other in drops[index:last])
            if index > adding[0] and drop.owner != owner and not back:
                raise ValueError(
                    f"{methods[drop.owner].name} drops tokens before layer {drop.layer}, where it would also drop the "
                    f"learned tokens of {method.name}; move the drop before the point where {method.name} adds "
                    f"them{'' if always else f', or after layer {drops[last].layer}'}"
                )


def _check_ranking(methods: tuple[PruningMethod, ...], drops: list[Drop]) -> None:
    """Reject ``rank_with='this_layer'`` if another method drops tokens at the same layer first."""
    for earlier, drop in pairwise(drops):
        method = methods[drop.owner]
        if earlier.layer == drop.layer and drop.ranked and method.needs.rank_with == "this_layer":
            raise ValueError(
                f"{method.name} ranks with the layer before layer {drop.layer}, but {methods[earlier.owner].name} "
                f"drops tokens there first; list {method.name} before it, or change the layer of one of them"
            )
