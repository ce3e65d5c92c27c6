"""What methods share that drop once, by one share of each image's tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune_train.core.stream import Drop
from vtprune_train.pruning.base import Positions, PruningMethod
from vtprune_train.pruning.checks import check_choice, check_share


@dataclass(frozen=True)
class OneShare(PruningMethod):
    """Each image keeps ``floor(keep * n)`` tokens before the decoder.

    Args:
        keep: share of tokens that stay, in (0, 1].
        positions: ``renumber`` numbers the survivors 0, 1, ...; ``keep`` leaves them where they were.

    Raises:
        ValueError: a setting is out of range.
    """

    keep: float = 0.5
    positions: Positions = "renumber"

    where: ClassVar[str] = "before the decoder"
    trains: ClassVar[str] = "yes"

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", float(self.keep))
        check_share("keep", self.keep)
        check_choice("positions", self.positions, ("keep", "renumber"))

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        return (Drop(0, self.keep),)
