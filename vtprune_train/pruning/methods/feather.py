"""FEATHER (arXiv 2412.13180): an early drop that keeps a uniform grid plus the tokens ranked highest without rotary
embedding, then a later, more aggressive drop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from vtprune_train.core.stream import Drop, SpanLayout
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.needs import Needs, Positions, RankWith
from vtprune_train.pruning.ops.grids import grids_of, spread, strided_cells
from vtprune_train.pruning.ops.scoring import visual_query_attention
from vtprune_train.pruning.ops.selection import picked_on_host, top_k_per_span
from vtprune_train.pruning.schedules.budget import first_that_fits
from vtprune_train.pruning.schedules.stages import check_schedule, earlier, one_per_layer, scaled_layers


class Floored(Drop):
    """A drop that always keeps a uniform grid, regardless of the ranking."""


class Feather(PruningMethod):
    """Before ``layers[0]`` each image keeps every ``stride``-th token of every ``stride``-th row and the best of the
    rest, ``floor(keep[0] * n)`` in all; before ``layers[1]`` it keeps the top ``floor(keep[1] * n)`` tokens, whether or
    not they are on the grid.

    Args:
        layers: two decoder layers, counted from 0. ``None``: 8 and 16 of 32, scaled to the depth.
        keep: keep ratios relative to each image's original tokens. The paper keeps the top 30 % plus the grid, then 9 %
            of the remaining tokens; since a stride-3 grid overlaps the top tokens by about 1/9, that is 0.378 and 0.034
            here.
        stride: grid stride.
        rank_with: ``this_layer``, the last layer before the drop (as published; no extra cost), or ``next_layer``.
        positions: ``keep`` keeps the positions of the kept tokens (published); ``renumber`` numbers them 0, 1, ...
    """

    layers: tuple[int, int] | None = None
    keep: tuple[float, float] = (0.378, 0.034)
    stride: PositiveInt = 3
    rank_with: RankWith = "this_layer"
    positions: Positions = "keep"

    name = "feather"
    paper = (
        "Feather the Throttle: Revisiting Visual Token Pruning for Vision-Language Model Acceleration (arXiv "
        "2412.13180)"
    )

    def __post_init__(self) -> None:
        check_schedule(self.layers, self.keep)

    @property
    def needs(self) -> Needs:
        return Needs(rank_with=self.rank_with, positions=self.positions, rotary=False)

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        if self.layers is None:
            first, second = scaled_layers((8, 16), 32, num_layers)
        else:
            check_schedule(self.layers, self.keep, num_layers)
            first, second = self.layers
        return one_per_layer((Floored(first, self.keep[0]), Drop(second, self.keep[1])))

    def score(self, candidates: Candidates) -> Tensor:
        return visual_query_attention(candidates.ranking, candidates.boundary)

    def choose(self, candidates: Candidates) -> Selection:
        boundary = candidates.boundary
        with torch.no_grad():
            scores = self.score(candidates)
            if isinstance(boundary.drop, Floored):
                scores = scores.index_fill(0, picked_on_host(boundary, self._floor), float("inf"))
        return Selection(top_k_per_span(scores, boundary.span_of_visual, boundary.take))

    def _floor(self, span: SpanLayout) -> np.ndarray:
        """Grid indices, evenly thinned if there are more than the image keeps."""
        grid = strided_cells(grids_of(span), self.stride)
        return grid if len(grid) <= span.after else grid[spread(span.after, len(grid))]

    def for_budget(self, share: float, num_layers: int) -> PruningMethod:
        """Scale ``keep``; if the layers before the first drop already use too much of the budget, move both drops
        earlier."""
        return first_that_fits(self._earlier(num_layers), share, num_layers)

    def _earlier(self, num_layers: int) -> Iterator[PruningMethod]:
        yield self
        for first, second in earlier([drop.layer for drop in self.drops(num_layers)]):
            yield replace(self, layers=(first, second))
