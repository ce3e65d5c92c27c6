"""VTC-CLS (arXiv 2412.05819): the class token's attention, summed over several layers of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune_train.pruning.base import Candidates, Positions, PruningMethod
from vtprune_train.pruning.checks import check_choice, check_share, check_whole
from vtprune_train.pruning.significance import neutral, signals_of
from vtprune_train.stream import Drop


@dataclass(frozen=True)
class VTCCLS(PruningMethod):
    """Each image keeps the ``floor(keep * n)`` tokens that the tower's class token attends to most.

    Args:
        keep: share of tokens that stay, in (0, 1].
        layers: how many layers of the tower are summed: the last that the decoder's features come from, and those in
            front of it; all of them where there are fewer.
        positions: ``renumber`` numbers the survivors 0, 1, ... (published); ``keep`` leaves them where they were.

    Raises:
        ValueError: a setting is out of range.
    """

    keep: float = 0.25
    layers: int = 8
    positions: Positions = "renumber"

    name: ClassVar[str] = "vtc_cls"
    paper: ClassVar[str] = "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs (arXiv 2412.05819)"
    where: ClassVar[str] = "before the decoder"
    trains: ClassVar[str] = "yes"

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", float(self.keep))
        check_share("keep", self.keep)
        check_whole("layers", self.layers, 1)
        check_choice("positions", self.positions, ("keep", "renumber"))

    @property
    def encoder_layers(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(range(-self.layers, 0))

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        return (Drop(0, self.keep),)

    def score(self, candidates: Candidates) -> Tensor:
        attention = signals_of(candidates, self.layers).attention
        return neutral(attention.sum(dim=0), candidates.boundary)
