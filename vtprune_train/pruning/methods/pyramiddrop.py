"""PyramidDrop (arXiv 2410.17247): staged dropping in the decoder, ranked by attention from the last instruction
token."""

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
    """Compute counts like the published code, with float multiplication: int(0.7 * 90) is 62."""

    def kept(self, length: int, before: int) -> int:
        return int(length * self.keep)


class PyramidDrop(PruningMethod):
    """Drop visual tokens before ``layers[i]``, keeping ``int(n * keep[i])`` of each image's n original tokens.

    Args:
        layers: decoder layers, counted from 0, before which tokens are dropped; increasing. ``None``: after a
            quarter, a half and three quarters of the decoder (8, 16, 24 of 32, as published).
        keep: keep ratios relative to each image's original tokens, non-increasing, in (0, 1].
        rank_with: layer whose attention ranks the tokens: ``next_layer``, the first after the drop (published code), or
            ``this_layer``, the last before it (paper; needs no extra projection).
        positions: ``renumber`` numbers the kept tokens 0, 1, ... (published); ``keep`` keeps their positions.
        without_instruction: what to do for samples with no text between image and answer (projector alignment):
            ``last_visual`` ranks with the image's last token (as published), ``uniform`` keeps an even grid.
        multi_turn: what a later turn on the same cache sees of earlier images: ``drop``, only the kept tokens;
            ``keep_dense``, all tokens, ranked again with the new question.
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
        if self.layers is None:  # with fewer layers than drops, several drops share a layer
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
        """Scales ``keep``; if the layers before the first drop use too much of the budget, move all drops earlier."""
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
