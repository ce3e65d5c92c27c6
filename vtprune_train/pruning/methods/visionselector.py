"""VisionSelector (arXiv 2510.16598): a small learned scorer selects visual tokens before the decoder.

Shape suffixes: V visual tokens, S images, N tokens of the largest image, C hidden size, W width of the scorer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from vtprune_train.core.rounding import floor_of
from vtprune_train.core.stream import Boundary, Drop, SpanLayout, to_device
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.methods.one_share import OneShare
from vtprune_train.pruning.needs import Needs, Positions
from vtprune_train.pruning.ops.selection import all_candidates, top_k_per_span
from vtprune_train.pruning.ops.significance import sizes_before
from vtprune_train.pruning.ops.soft_top_k import soft_top_k
from vtprune_train.pruning.schedules.stages import AtLeastOne
from vtprune_train.pruning.setting_types import Share

INITIAL = 1e-4  # standard deviation of the initial weights (published): all scores start out nearly equal
HOT = 10.0  # temperature at the start of a warm-up, as a multiple of the configured one


class Scorer(nn.Module):
    """Score of a token: mean over its image's tokens of the dot products of its query with their keys, divided by the
    square root of the width.

    The mean is taken before the key projection, which is linear, so that the cost grows with the number of tokens and
    not with its square. The query projection has no bias: it would add the same number to all scores of an image. The
    projections are not called ``q_proj`` and ``k_proj``, because adapters select the decoder's by these names.

    Args:
        hidden: C.
        width: W.
    """

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.score_query, self.score_key = nn.Linear(hidden, width, bias=False), nn.Linear(hidden, width)
        for projection in (self.score_query, self.score_key):
            nn.init.normal_(projection.weight, std=INITIAL)
        nn.init.zeros_(self.score_key.bias)

    def forward(self, rows_VC: Tensor, means_SC: Tensor | None = None, image_V: Tensor | None = None) -> Tensor:
        """[V] float32 scores; without ``means_SC`` (mean token of each image) and ``image_V`` (int64, the image of each
        token), every row is an image."""
        means_SC = rows_VC if means_SC is None else means_SC
        queries, keys = self.score_query(rows_VC), self.score_key(means_SC)
        keys = keys if image_V is None else keys.index_select(0, image_V)
        return (queries.float() * keys.float()).sum(dim=-1) * queries.shape[-1] ** -0.5


class VisionSelector(OneShare):
    """Keep the floor(keep * n) tokens of each image that a learned scorer ranks highest, at least one.

    Args:
        keep: keep ratio, in (0, 1]; the published scorers were trained with 0.2.
        positions: ``keep`` keeps the positions of the kept tokens (published); ``renumber`` numbers them 0, 1, ...
        width: width of the scorer's projections; ``None``: half of the decoder's hidden size (published).
        soft: keep all tokens, each multiplied by its keep probability, as the published training does. No token is
            dropped then, in training or afterwards: set it to false to drop.
        temperature: of the differentiable top-k that the scorer is trained through; smaller values give keep
            probabilities closer to 0 and 1. A warm-up lowers it to this value from ten times as much.
    """

    keep: Share = 0.2
    positions: Positions = "keep"
    width: PositiveInt | None = None
    soft: bool = False
    temperature: PositiveFloat = 1.0

    name = "visionselector"
    paper = (
        "VisionSelector: End-to-End Learnable Visual Token Compression for Efficient Multimodal LLMs (arXiv 2510.16598)"
    )
    trains = "yes, required: the scorer is learned"

    @property
    def needs(self) -> Needs:
        return Needs(positions=self.positions, differentiable=True)

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        return (Drop(0, 1.0) if self.soft else AtLeastOne(0, self.keep),)

    def module(self, hidden: int, num_layers: int) -> nn.Module:
        return Scorer(hidden, self.width or max(1, hidden // 2))

    def choose(self, candidates: Candidates) -> Selection:
        boundary, hidden = candidates.boundary, candidates.hidden
        assert isinstance(candidates.module, Scorer), "the method's scorer is missing"
        means = [tokens.float().mean(dim=0).to(hidden.dtype) for tokens in hidden.split(sizes_before(boundary))]
        means_SC = torch.stack(means) if means else hidden[:0]
        scores = candidates.module(hidden, means_SC.nan_to_num(0.0), boundary.span_of_visual)
        if self.soft:
            chance = self._chances(scores, boundary.spans)
            chosen = all_candidates(boundary)
            return Selection(chosen, chosen, hidden * chance.to(hidden.dtype)[:, None])
        chosen = top_k_per_span(scores.detach(), boundary.span_of_visual, boundary.take)
        if not candidates.training:
            return Selection(chosen)
        chance = self._chances(scores, boundary.spans).index_select(0, chosen)
        kept = hidden.index_select(0, chosen)
        nothing = (chance - chance.detach()).to(kept.dtype)  # zero; only its gradient counts
        return Selection(chosen, torch.arange(len(chosen), device=chosen.device), kept + kept * nothing[:, None])

    def _chances(self, scores_V: Tensor, spans: Sequence[SpanLayout]) -> Tensor:
        """[V] float32 keep probabilities, see :func:`soft_top_k`."""
        if not len(scores_V):
            return scores_V
        sizes = np.array([span.before for span in spans if span.before], dtype=np.int64)
        take = np.array([min(size, max(1, floor_of(self.keep, size))) for size in sizes.tolist()], dtype=np.float32)
        present = np.arange(sizes.max()) < sizes[:, None]
        rows = np.where(present, np.cumsum(present.ravel()).reshape(present.shape) - 1, 0)
        rows_SN, present_SN, take_S1, places_V = to_device(
            (rows, present, take[:, None], np.flatnonzero(present.ravel())), scores_V.device
        )
        scores_SN = scores_V.index_select(0, rows_SN.flatten()).view(rows_SN.shape)
        return soft_top_k(scores_SN, present_SN, take_S1, self.temperature).flatten().index_select(0, places_V)

    def eased(self, start: float, progress: float) -> PruningMethod:
        """Anneal the temperature together with the keep ratio, from :data:`HOT` times its value."""
        [keep] = super().eased(start, progress).ratios
        return replace(self, keep=keep, temperature=self.temperature * HOT ** (1.0 - progress))

    def selector_flops(self, hidden: int, boundary: Boundary) -> float:
        width = self.width or max(1, hidden // 2)
        return 2.0 * width * (hidden + 1) * sum(span.before for span in boundary.spans)
