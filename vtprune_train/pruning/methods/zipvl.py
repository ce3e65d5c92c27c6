"""ZipVL (arXiv 2410.08584): each layer keeps the fewest visual keys that hold a given mass of its attention."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from vtprune_train.core.rounding import floor_of
from vtprune_train.core.stream import Boundary
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Ranking
from vtprune_train.pruning.needs import MultiTurn, Needs
from vtprune_train.pruning.ops.per_head import judged_attention, keep_best, of_visual, span_sizes
from vtprune_train.pruning.schedules.budget import bisected
from vtprune_train.pruning.setting_types import Share

# Share of tokens kept at each tau on LLaVA-NeXT-7B (Table 1 of the paper), plus the end points that hold for any model.
PUBLISHED_SHARES = ((0.0, 0.0), (0.96, 0.404), (0.975, 0.497), (1.0, 1.0))


def mass_holders(weights_QL: Tensor, tau: float) -> Tensor:
    """[Q, L] bool mask of the smallest set of tokens per row whose attention sums to ``tau``; ties go to the earlier
    token.

    Args:
        weights_QL: [Q, L] float32, attention averaged over heads; each row sums to 1.
        tau: attention mass to cover; 1 selects all tokens.
    """
    if tau >= 1.0:
        return torch.ones_like(weights_QL, dtype=torch.bool)
    ordered = torch.sort(weights_QL, dim=1, descending=True, stable=True)
    before = ordered.values.cumsum(dim=1) - ordered.values
    return torch.zeros_like(weights_QL, dtype=torch.bool).scatter(1, ordered.indices, before < tau)


class ZipVL(PruningMethod):
    """After prefill, find in each layer the smallest set of tokens (visual and text) that covers the mass ``tau`` of
    the image's query-row attention, and keep the visual tokens in that set. All heads keep the same tokens; text is
    always kept.

    Args:
        tau: attention mass, in (0, 1]; the paper uses 0.975 and 0.96.
        keep: at most ``floor(keep * n)`` of an image's n tokens in any layer; 1 sets no limit.
        multi_turn: which tokens of earlier images later turns see: ``drop``, only those that each layer kept;
            ``keep_dense``, all of them, ranked again with the new question.
    """

    tau: Share = 0.975
    keep: Share = 1.0
    multi_turn: MultiTurn = "drop"

    name = "zipvl"
    paper = "ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification (arXiv 2410.08584)"
    where = "key-value cache"
    trains = "yes, as a mask in each layer, consistent with inference; saves no FLOPs"

    @property
    def needs(self) -> Needs:
        return Needs(multi_turn=self.multi_turn)

    def key_layers(self, num_layers: int) -> tuple[int, ...]:
        return tuple(range(num_layers))

    def keys(self, layer: int, ranking: Ranking, boundary: Boundary) -> Tensor:
        scores, holders = [], []
        for weights_GQL, judge_L in judged_attention(ranking, boundary):
            weights_QL = weights_GQL.mean(dim=0)
            scores.append(weights_QL.gather(0, judge_L[None])[0])
            holders.append(mass_holders(weights_QL, self.tau).gather(0, judge_L[None])[0])
        scores_V, holds_V = of_visual(scores, boundary), of_visual(holders, boundary)
        span_V = boundary.span_of_visual
        most = floor_of(self.keep, span_sizes(span_V, len(boundary.spans)))
        kept = holds_V & keep_best(scores_V[None], span_V, most)[0]
        return kept.expand(ranking.keys.shape[1], -1)

    def input_share(self, num_layers: int) -> float:
        """Share of visual keys read during decoding, estimated by linear interpolation of the published LLaVA-NeXT-7B
        values. All tokens enter every layer."""
        for (low_tau, low), (high_tau, high) in pairwise(PUBLISHED_SHARES):
            if self.tau <= high_tau:
                return min(self.keep, low + (high - low) * (self.tau - low_tau) / (high_tau - low_tau))
        raise AssertionError(self.tau)

    def for_budget(self, share: float, num_layers: int) -> ZipVL:
        """Set ``keep`` to ``share`` as an upper limit. Keep ``tau``, unless the published values predict fewer kept
        tokens than ``share``; then raise it to match."""

        def massed(tau: float) -> ZipVL:
            return replace(self, tau=max(tau, 1e-6), keep=1.0)

        fitted: ZipVL = bisected(massed, 0.0, 1.0, share, num_layers)
        return replace(self, tau=max(self.tau, fitted.tau), keep=share)

    def eased(self, start: float, progress: float) -> ZipVL:
        tau, keep = (first + (last - first) * progress for first, last in ((1.0, self.tau), (start, self.keep)))
        return replace(self, tau=tau, keep=keep)
