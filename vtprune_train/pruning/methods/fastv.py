"""FastV (arXiv 2403.06764): one early drop, ranked by the attention from the last prompt token."""

from __future__ import annotations

from pydantic import PositiveInt
from torch import Tensor

from vtprune_train.core.stream import Drop
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Candidates
from vtprune_train.pruning.needs import Needs, Positions, RankWith
from vtprune_train.pruning.ops.scoring import mean_query_attention
from vtprune_train.pruning.schedules.stages import check_layer, scaled_layers
from vtprune_train.pruning.setting_types import Share


class FastV(PruningMethod):
    """Before decoder layer ``layer`` each image keeps ``floor(keep * n)`` of its n tokens, those that receive the most
    head-averaged attention in the previous layer.

    Args:
        layer: K of the paper, counted from 0, at least 1. ``None``: 2 of 32, scaled to the depth.
        keep: 1 - R of the paper, in (0, 1].
        rank_with: ``this_layer``, the last layer with all tokens (as published; no extra cost), or ``next_layer``.
        positions: ``keep`` keeps the positions of the kept tokens (published); ``renumber`` numbers them 0, 1, ...
    """

    layer: PositiveInt | None = None
    keep: Share = 0.5
    rank_with: RankWith = "this_layer"
    positions: Positions = "keep"

    name = "fastv"
    paper = (
        "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large "
        "Vision-Language Models (arXiv 2403.06764)"
    )

    @property
    def needs(self) -> Needs:
        return Needs(rank_with=self.rank_with, positions=self.positions)

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        layer = scaled_layers((2,), 32, num_layers)[0] if self.layer is None else self.layer
        check_layer("layer", layer, num_layers, least=1)
        return (Drop(layer, self.keep),)

    def score(self, candidates: Candidates) -> Tensor:
        return mean_query_attention(candidates.ranking, candidates.boundary)
