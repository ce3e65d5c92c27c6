"""LVLM_CSP (arXiv 2504.10854): clustering (few tokens), scattering (all tokens), pruning (best tokens)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vtprune_train.core.stream import Drop
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.needs import Needs
from vtprune_train.pruning.ops.scoring import mean_query_attention
from vtprune_train.pruning.ops.selection import all_candidates, picked_on_host, top_k_per_span
from vtprune_train.pruning.schedules.budget import first_that_fits
from vtprune_train.pruning.schedules.stages import AtLeastOne, scaled_layers
from vtprune_train.pruning.setting_types import Share


def representatives(length: int, count: int) -> np.ndarray:
    """[count] int64, indices of every ``floor(length / count)``-th token (uniform clusters, as in the paper)."""
    return np.arange(count) * (length // max(count, 1))


def clusters(length: int, count: int) -> np.ndarray:
    """[length] int64, each token's representative: the nearest representative at or before it."""
    firsts = representatives(length, count)
    return firsts[np.searchsorted(firsts, np.arange(length), side="right") - 1]


class LVLMCSP(PruningMethod):
    """Clustering, scattering, pruning: until layer ``layers[0]`` one token represents each cluster; then all tokens are
    restored; from layer ``layers[1]`` on only the most attended tokens remain.

    Args:
        layers: two layer indices: tokens are restored before the first and pruned before the second; set the second to
            num_layers to disable pruning. ``None``: 12 and 20 of 32, scaled to the depth (our choice; we could not find
            the paper's values).
        keep: number of clusters and number of finally kept tokens, as fractions of each image's tokens (at least one is
            kept). Defaults are ours: with the default layers they give the 65 % reduction reported in the paper.
        scatter: ``own`` restores tokens unchanged; ``cluster`` (ours) also adds to each token the change that its
            representative has undergone.
    """

    layers: tuple[int, int] | None = None
    keep: tuple[Share, Share] = (0.16, 0.1)
    scatter: Literal["own", "cluster"] = "own"

    name = "lvlm_csp"
    drops_after = None  # one of the two layers restores tokens
    paper = (
        "LVLM_CSP: Accelerating Large Vision Language Models via Clustering, Scattering, and Pruning for "
        "Reasoning Segmentation (arXiv 2504.10854)"
    )
    where = "before the decoder and between layers; all tokens return in between"
    trains = "yes (published for inference)"

    def __post_init__(self) -> None:
        if self.layers is not None and not 1 <= self.layers[0] < self.layers[1]:
            raise ValueError(f"layers={list(self.layers)} must be two increasing layers, both at least 1")

    @property
    def needs(self) -> Needs:
        return Needs(rank_with="next_layer")

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        back, prune = scaled_layers((12, 20), 32, num_layers)
        prune = max(prune, back + 1)
        if self.layers is not None:
            back, prune = self.layers
            if back >= num_layers or prune > num_layers:
                never = "return" if back >= num_layers else "be pruned"
                raise ValueError(
                    f"layers={list(self.layers)}: in a decoder of {num_layers} layers the tokens would never {never}; "
                    f"use layers below {num_layers}"
                )
        drops = (
            AtLeastOne(0, self.keep[0], ranked=False),
            Drop(back, 1.0, returns=True, ranked=False),
            AtLeastOne(prune, self.keep[1]),
        )
        return drops if prune < num_layers else drops[:2]

    def choose(self, candidates: Candidates) -> Selection:
        boundary = candidates.boundary
        if boundary.drop.layer == 0:
            candidates.memory["clusters"] = picked_on_host(boundary, lambda span: clusters(span.before, span.after))
            return Selection(picked_on_host(boundary, lambda span: representatives(span.before, span.after)))
        if boundary.drop.returns:
            return self._scattered(candidates)
        with torch.no_grad():
            scores = mean_query_attention(candidates.ranking, boundary)
        return Selection(top_k_per_span(scores, boundary.span_of_visual, boundary.take))

    def _scattered(self, candidates: Candidates) -> Selection:
        all_tokens = all_candidates(candidates.boundary)
        if self.scatter == "own":
            return Selection(all_tokens)
        moved: Tensor = candidates.hidden - candidates.before  # zero except for the representatives
        values = candidates.before + moved.index_select(0, candidates.memory["clusters"])
        return Selection(all_tokens, all_tokens, values)

    def for_budget(self, share: float, num_layers: int) -> PruningMethod:
        """Scale ``keep``; if the layers that process all tokens use too much of the budget, move pruning earlier."""
        return first_that_fits(self._earlier(num_layers), share, num_layers)

    def _earlier(self, num_layers: int) -> Iterator[PruningMethod]:
        yield self
        back = self.drops(num_layers)[1].layer
        end = self.drops(num_layers)[2].layer if len(self.drops(num_layers)) > 2 else num_layers
        for prune in range(end - 1, back, -1):
            yield replace(self, layers=(back, prune))
