"""FoPru (arXiv 2411.14164): keeps the tokens the vision tower attends to most, individually or as whole rows."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vtprune_train.core.stream import Boundary, to_device
from vtprune_train.pruning.candidates import Candidates
from vtprune_train.pruning.methods.one_share import OneShare
from vtprune_train.pruning.needs import Needs
from vtprune_train.pruning.ops.grids import grids_of
from vtprune_train.pruning.ops.significance import neutral, ranked, signals_of
from vtprune_train.pruning.setting_types import Share


class FoPru(OneShare):
    """Keep floor(keep * n) tokens per image, ranked by the mean attention they receive from all tokens of their tile in
    the vision tower.

    Args:
        keep: keep ratio, in (0, 1]; the paper uses 0.25 and 0.5.
        strategy: ``rank``, the best tokens; ``row``, whole grid rows ranked by their mean score; the last row that only
            partly fits contributes its best tokens.
        layer: layer of the vision tower; -1 is the layer whose output the projector receives.
        positions: ``renumber`` numbers the kept tokens 0, 1, ... (published); ``keep`` keeps their positions.
    """

    keep: Share = 0.25
    strategy: Literal["rank", "row"] = "rank"
    layer: int = -1

    name = "fopru"
    paper = "FoPru: Focal Pruning for Efficient Large Vision-Language Models (arXiv 2411.14164)"

    @property
    def needs(self) -> Needs:
        return Needs(positions=self.positions, encoder_layers=(self.layer,), encoder_rows="all")

    def score(self, candidates: Candidates) -> Tensor:
        significance = neutral(signals_of(candidates, 1).attention[0], candidates.boundary)
        return significance if self.strategy == "rank" else by_rows(significance, candidates.boundary)


def by_rows(significance_V: Tensor, boundary: Boundary) -> Tensor:
    """[V] float32 scores that rank rows by their mean score (ties: earlier row first) and tokens within a row by their
    own score."""
    if not len(significance_V):
        return significance_V
    lengths = np.concatenate([np.repeat([c for _, c in grid], [r for r, _ in grid]) for grid in _grids(boundary)])
    rows = np.repeat(np.arange(len(lengths)), lengths)
    sizes, of_token = to_device((lengths, rows), significance_V.device)
    # unsafe=True skips the size check, which would synchronize with the device
    means = torch.segment_reduce(significance_V, "mean", lengths=sizes, axis=0, unsafe=True)
    best = torch.sort(means, descending=True, stable=True).indices
    place = torch.empty_like(best)
    place[best] = torch.arange(len(best), device=best.device)
    order = ranked(significance_V, place.index_select(0, of_token))
    scores = torch.empty(len(order), dtype=torch.float32, device=order.device)
    scores[order] = -torch.arange(len(order), dtype=torch.float32, device=order.device)
    return scores


def _grids(boundary: Boundary) -> list[tuple[tuple[int, int], ...]]:
    return [grids_of(span) for span in boundary.spans]
