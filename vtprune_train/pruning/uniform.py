"""The baseline ``uniform``: an even grid of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune_train.pruning.base import Candidates, Positions, PruningMethod, Selection
from vtprune_train.pruning.checks import check_choice, check_layer, check_share, check_whole
from vtprune_train.pruning.grids import even_cells, rasters_of
from vtprune_train.pruning.selection import picked_on_host
from vtprune_train.stream import Drop


@dataclass(frozen=True)
class Uniform(PruningMethod):
    """Each image keeps ``floor(keep * n)`` tokens, spread evenly over its rasters in both directions.

    Args:
        keep: share of tokens that stay, in (0, 1].
        layer: decoder layer before which the others are dropped; 0: before the decoder.
        positions: ``keep`` leaves survivors where they were; ``renumber`` numbers them 0, 1, ...

    Raises:
        ValueError: a setting is out of range.
    """

    keep: float = 0.5
    layer: int = 0
    positions: Positions = "keep"

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "baseline"
    where: ClassVar[str] = "before the decoder"
    trains: ClassVar[str] = "yes"

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", float(self.keep))
        check_share("keep", self.keep)
        check_whole("layer", self.layer, 0)
        check_choice("positions", self.positions, ("keep", "renumber"))

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        check_layer("layer", self.layer, num_layers)
        return (Drop(self.layer, self.keep),)

    def choose(self, candidates: Candidates) -> Selection:
        return Selection(picked_on_host(candidates.boundary, lambda span: even_cells(rasters_of(span), span.after)))
