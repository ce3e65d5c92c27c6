"""What the baselines ``random``, ``uniform`` and ``pool`` share: they may also drop before a later layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune_train.core.stream import Drop
from vtprune_train.pruning.base import Positions
from vtprune_train.pruning.checks import check_layer, check_whole
from vtprune_train.pruning.methods.one_share import OneShare


@dataclass(frozen=True)
class Baseline(OneShare):
    """Each image becomes ``floor(keep * n)`` tokens before layer ``layer``.

    Args:
        keep: share of tokens that stay, in (0, 1].
        positions: ``keep`` leaves survivors where they were; ``renumber`` numbers them 0, 1, ...
        layer: decoder layer before which the others go; 0: before the decoder.

    Raises:
        ValueError: a setting is out of range.
    """

    positions: Positions = "keep"
    layer: int = 0

    paper: ClassVar[str] = "baseline"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("layer", self.layer, 0)

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        check_layer("layer", self.layer, num_layers)
        return (Drop(self.layer, self.keep),)
