"""Shared base classes of methods with a single drop and a single keep ratio."""

from __future__ import annotations

from pydantic import NonNegativeInt
from torch import Tensor

from vtprune_train.core.stream import Drop
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Candidates
from vtprune_train.pruning.needs import Needs, Positions
from vtprune_train.pruning.schedules.stages import AtLeastOne, check_layer
from vtprune_train.pruning.setting_types import Share
from vtprune_train.pruning.tower import groups_of, one_per_group


class OneShare(PruningMethod):
    """Each image keeps ``floor(keep * n)`` tokens before the decoder.

    Args:
        keep: keep ratio, in (0, 1].
        positions: ``renumber`` numbers the kept tokens 0, 1, ...; ``keep`` keeps their positions.
    """

    keep: Share = 0.5
    positions: Positions = "renumber"

    where = "before the decoder"

    @property
    def needs(self) -> Needs:
        return Needs(positions=self.positions)

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        return (Drop(0, self.keep),)


class Baseline(OneShare):
    """Base of ``random``, ``uniform`` and ``pool``: reduce each image to floor(keep * n) tokens before layer ``layer``.

    Args:
        keep: keep ratio, in (0, 1].
        positions: ``keep`` keeps the positions of the kept tokens; ``renumber`` numbers them 0, 1, ...
        layer: decoder layer before which tokens are dropped; 0 means before the decoder.
    """

    positions: Positions = "keep"
    layer: NonNegativeInt = 0

    paper = "baseline"

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        check_layer("layer", self.layer, num_layers)
        return (Drop(self.layer, self.keep),)


class MergedInTower(OneShare):
    """Base of methods that change the tokens inside the vision tower (:attr:`Needs.tower`): each image keeps
    ``floor(keep * n)`` tokens, at least one: the first patch of each of the tower's tokens, those that hold most of the
    image's patches first, then newlines.

    Args:
        keep: share of a tile's patches that the tower's tokens stand for, in (0, 1].
        positions: ``renumber`` numbers the kept tokens 0, 1, ...; ``keep`` keeps their positions.
    """

    where = "vision tower"

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        return (AtLeastOne(0, self.keep),)

    def score(self, candidates: Candidates) -> Tensor:
        return one_per_group(groups_of(candidates), candidates.boundary.span_of_visual)
