"""PyramidDrop (arXiv 2410.17247): staged dropping inside the decoder, ranked by the instruction's last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune_train.pruning.base import MultiTurn, Positions, PruningMethod, Ranking, RankWith
from vtprune_train.pruning.schedule import check_schedule, quarters
from vtprune_train.pruning.scoring import mean_query_attention
from vtprune_train.stream import Boundary, Drop, SegmentLayout, StreamPlan, plan_stream


@dataclass(frozen=True)
class PyramidDrop(PruningMethod):
    """Drop visual tokens before ``layers[i]``, keeping ``floor(keep[i] * n)`` of each image's n original tokens.

    Args:
        layers: decoder layers, counted from 0, before which tokens are dropped; increasing. ``None``: after a
            quarter, a half and three quarters of the decoder (8, 16, 24 of 32, as published).
        keep: shares of each image's original tokens that remain, not increasing, in (0, 1].
        rank_with: the layer whose attention ranks: ``next_layer`` is the first of the stage that begins (the
            published code), ``this_layer`` the last of the stage that ends (the paper; no extra projection).
        positions: ``renumber`` gives the survivors positions 0, 1, ... (published); ``keep`` leaves them as they were.
        without_instruction: what ranks where no text stands between image and answer, as in projector alignment:
            ``last_visual`` the image's last token (published), ``uniform`` an even grid.
        multi_turn: what a later turn on the same cache sees of earlier images: ``drop``, what is left of them;
            ``keep_dense``, all of them, ranked anew by that turn's question.

    Raises:
        ValueError: a setting is out of range; names the setting, its value and the way out.
    """

    layers: tuple[int, ...] | None = None
    keep: tuple[float, ...] = (0.5, 0.25, 0.125)
    rank_with: RankWith = "next_layer"
    positions: Positions = "renumber"
    without_instruction: Literal["last_visual", "uniform"] = "last_visual"
    multi_turn: MultiTurn = "drop"

    name: ClassVar[str] = "pyramiddrop"

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(float(ratio) for ratio in self.keep))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        check_schedule(self.layers, self.keep)
        for setting, allowed in (
            ("rank_with", ("next_layer", "this_layer")),
            ("positions", ("renumber", "keep")),
            ("without_instruction", ("last_visual", "uniform")),
            ("multi_turn", ("drop", "keep_dense")),
        ):
            if getattr(self, setting) not in allowed:
                raise ValueError(f"{setting}={getattr(self, setting)!r} is not one of {', '.join(allowed)}")

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        layers = quarters(num_layers, len(self.keep)) if self.layers is None else self.layers
        check_schedule(layers, self.keep, num_layers)
        return tuple(Drop(layer, keep) for layer, keep in zip(layers, self.keep, strict=True))

    def plan(self, segments: Sequence[SegmentLayout], num_layers: int) -> StreamPlan:
        uniform = self.without_instruction == "uniform"
        return plan_stream(segments, self.drops(num_layers), num_layers, uniform_if_visual_query=uniform)

    def score(self, ranking: Ranking, boundary: Boundary) -> Tensor:
        scores = mean_query_attention(ranking.queries, ranking.keys, ranking.scaling, boundary)
        if boundary.uniform is None:
            return scores
        return torch.where(boundary.uniform.isnan(), scores, boundary.uniform)
