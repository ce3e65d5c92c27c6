"""PyramidDrop (arXiv 2410.17247): staged dropping inside the decoder, ranked by the instruction's last token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from vtprune_train.core.stream import Drop
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Candidates
from vtprune_train.pruning.needs import MultiTurn, Needs, Positions, RankWith
from vtprune_train.pruning.ops.scoring import mean_query_attention
from vtprune_train.pruning.schedules.budget import first_that_fits
from vtprune_train.pruning.schedules.stages import check_schedule, earlier, one_per_layer, quarters


class PublishedDrop(Drop):
    """Counts as the published code does, by a product of floats: 0.7 of 90 tokens are 62."""

    def kept(self, length: int, before: int) -> int:
        return int(length * self.keep)


class PyramidDrop(PruningMethod):
    """Drop visual tokens before ``layers[i]``, keeping ``int(n * keep[i])`` of each image's n original tokens.

    Args:
        layers: decoder layers, counted from 0, before which tokens are dropped; increasing. ``None``: after a
            quarter, a half and three quarters of the decoder (8, 16, 24 of 32, as published).
        keep: shares of each image's original tokens that remain, not increasing, in (0, 1].
        rank_with: the layer whose attention ranks: ``next_layer`` is the first of the stage that begins (the
            published code), ``this_layer`` the last of the stage that ends (the paper; no extra projection).
        positions: ``renumber`` numbers the kept tokens 0, 1, ... (published); ``keep`` leaves them as they were.
        without_instruction: what ranks where no text stands between image and answer, as in projector alignment:
            ``last_visual`` the image's last token (published), ``uniform`` an even grid.
        multi_turn: what a later turn on the same cache sees of earlier images: ``drop``, what is left of them;
            ``keep_dense``, all of them, ranked again by that turn's question.
    """

    layers: tuple[int, ...] | None = None
    keep: tuple[float, ...] = (0.5, 0.25, 0.125)
    rank_with: RankWith = "next_layer"
    positions: Positions = "renumber"
    without_instruction: Literal["last_visual", "uniform"] = "last_visual"
    multi_turn: MultiTurn = "drop"

    name = "pyramiddrop"
    paper = (
        "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction "
        "(arXiv 2410.17247)"
    )

    def __post_init__(self) -> None:
        check_schedule(self.layers, self.keep)

    @property
    def needs(self) -> Needs:
        return Needs(rank_with=self.rank_with, positions=self.positions, multi_turn=self.multi_turn)

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        if self.layers is None:  # on fewer layers than drops several fall on one
            layers = tuple(min(num_layers - 1, max(1, layer)) for layer in quarters(num_layers, len(self.keep)))
        else:
            layers = self.layers
            check_schedule(layers, self.keep, num_layers)
        uniform = self.without_instruction == "uniform"
        drops = [
            PublishedDrop(layer, keep, uniform_without_text=uniform)
            for layer, keep in zip(layers, self.keep, strict=True)
        ]
        return one_per_layer(drops)

    def for_budget(self, share: float, num_layers: int) -> PruningMethod:
        """Scales ``keep``; where the layers before the first drop leave too little of ``share``, all come earlier."""
        return first_that_fits(self._earlier(num_layers), share, num_layers)

    def _earlier(self, num_layers: int) -> Iterator[PruningMethod]:
        yield self
        drops = self.drops(num_layers)
        if len(drops) == len(self.keep):
            for layers in earlier([drop.layer for drop in drops]):
                yield replace(self, layers=layers)

    def score(self, candidates: Candidates) -> Tensor:
        boundary = candidates.boundary
        scores = mean_query_attention(candidates.ranking, boundary)
        if boundary.uniform is None:
            return scores
        return torch.where(boundary.uniform.isnan(), scores, boundary.uniform)
