"""The contract of a pruning method: where it acts, what it scores, how many tokens stay, which ones.

A method is a frozen dataclass of its settings with pure functions on tensors; it holds no state between steps and
never sees a model. The decoder loop (:mod:`vtprune_train.models.decoder`) asks it at every boundary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from vtprune_train.pruning.selection import top_k_per_span
from vtprune_train.stream import Boundary, Drop, SegmentLayout, StreamPlan, plan_stream

RankWith = Literal["next_layer", "this_layer"]
Positions = Literal["renumber", "keep"]
MultiTurn = Literal["drop", "keep_dense"]


@dataclass(frozen=True)
class Ranking:
    """Rotated queries and keys of the ranking layer, without gradients.

    ``queries`` [Q, H, D] of ``boundary.query_rows``; ``keys`` [T, G, D] of the whole stream (G key-value heads);
    ``scaling`` multiplies their products.
    """

    queries: Tensor
    keys: Tensor
    scaling: float


class PruningMethod(ABC):
    """One way of dropping visual tokens. Subclasses are frozen dataclasses."""

    name: ClassVar[str]
    rank_with: RankWith
    positions: Positions
    multi_turn: MultiTurn = "drop"

    @abstractmethod
    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        """Where and how many, for a decoder of ``num_layers`` layers.

        Raises:
            ValueError: a setting does not fit the decoder, naming the setting, its value and the way out.
        """

    @abstractmethod
    def score(self, ranking: Ranking, boundary: Boundary) -> Tensor:
        """[V] float32, the worth of each visual token before ``boundary``; higher stays."""

    def plan(self, segments: Sequence[SegmentLayout], num_layers: int) -> StreamPlan:
        """Lay out a micro-batch's stages (host only)."""
        return plan_stream(segments, self.drops(num_layers), num_layers)

    def select(self, scores: Tensor, boundary: Boundary) -> Tensor:
        """[K] int64, ascending positions in ``boundary.visual_rows`` that stay, without a device-to-host copy."""
        return top_k_per_span(scores, boundary.span_of_visual, boundary.take)

    def eased(self, start: float, progress: float) -> PruningMethod:
        """The method on its way from keeping the share ``start`` at every boundary (``progress`` 0) to itself (1).

        Raises:
            ValueError: it has no ratios ``keep`` that could move.
        """
        keep = getattr(self, "keep", None)
        if not isinstance(keep, tuple):
            raise ValueError(f"{self.name} has no keep ratios to anneal; use pruning.warmup.kind=dense")
        return replace(self, keep=tuple(start + (ratio - start) * progress for ratio in keep))  # type: ignore[type-var]

    def settings(self) -> dict[str, Any]:
        """The settings as plain data, as they stand in a checkpoint's ``config.json`` and in YAML."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}  # type: ignore[call-overload]
        return {"method": self.name, **values}
