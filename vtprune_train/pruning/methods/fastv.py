"""FastV (arXiv 2403.06764): one early drop, ranked by the attention that the last token of the prompt has given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune_train.core.stream import Drop
from vtprune_train.pruning.base import Positions, PruningMethod, RankWith
from vtprune_train.pruning.candidates import Candidates
from vtprune_train.pruning.checks import check_choice, check_layer, check_share, check_whole
from vtprune_train.pruning.ops.scoring import mean_query_attention
from vtprune_train.pruning.schedules.stages import scaled_layers


@dataclass(frozen=True)
class FastV(PruningMethod):
    """Before decoder layer ``layer`` each image keeps ``floor(keep * n)`` of its n tokens, those with the most
    attention in the layer before, mean over heads.

    Args:
        layer: K of the paper, counted from 0, at least 1. ``None``: 2 of 32, scaled to the depth.
        keep: 1 - R of the paper, in (0, 1].
        rank_with: ``this_layer``, the last layer that saw all tokens (published; free), or ``next_layer``.
        positions: ``keep`` leaves survivors where they were (published); ``renumber`` numbers them 0, 1, ...

    Raises:
        ValueError: a setting is out of range.
    """

    layer: int | None = None
    keep: float = 0.5
    rank_with: RankWith = "this_layer"
    positions: Positions = "keep"

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = (
        "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large "
        "Vision-Language Models (arXiv 2403.06764)"
    )
    where: ClassVar[str] = "between layers"
    trains: ClassVar[str] = "yes"

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", float(self.keep))
        check_share("keep", self.keep)
        check_choice("rank_with", self.rank_with, ("this_layer", "next_layer"))
        check_choice("positions", self.positions, ("keep", "renumber"))
        if self.layer is not None:
            check_whole("layer", self.layer, 1)

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        layer = scaled_layers((2,), 32, num_layers)[0] if self.layer is None else self.layer
        check_layer("layer", layer, num_layers, least=1)
        return (Drop(layer, self.keep),)

    def score(self, candidates: Candidates) -> Tensor:
        ranking = candidates.ranking
        assert ranking is not None
        return mean_query_attention(ranking.queries, ranking.keys, ranking.scaling, candidates.boundary)
