"""What the baselines ``random``, ``uniform`` and ``pool`` share: one drop, before any layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune_train.pruning.base import Positions, PruningMethod
from vtprune_train.pruning.checks import check_choice, check_layer, check_share, check_whole
from vtprune_train.stream import Drop


@dataclass(frozen=True)
class Baseline(PruningMethod):
    """Each image becomes ``floor(keep * n)`` tokens before layer ``layer``.

    Args:
        keep: share of tokens that stay, in (0, 1].
        layer: decoder layer before which the others go; 0: before the decoder.
        positions: ``keep`` leaves survivors where they were; ``renumber`` numbers them 0, 1, ...

    Raises:
        ValueError: a setting is out of range.
    """

    keep: float = 0.5
    layer: int = 0
    positions: Positions = "keep"

    paper: ClassVar[str] = "baseline"
    where: ClassVar[str] = "before the decoder"

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", float(self.keep))
        check_share("keep", self.keep)
        check_whole("layer", self.layer, 0)
        check_choice("positions", self.positions, ("keep", "renumber"))

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        check_layer("layer", self.layer, num_layers)
        return (Drop(self.layer, self.keep),)
