"""DART (arXiv 2502.11494): after an early decoder layer, the visual tokens that duplicate a few pivot tokens least."""

from __future__ import annotations

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.nn.functional import normalize

from vtprune_train.core.stream import Boundary, Drop
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.needs import Needs, Positions, RankWith
from vtprune_train.pruning.ops.scoring import images_at
from vtprune_train.pruning.schedules.stages import check_layer, scaled_layers
from vtprune_train.pruning.setting_types import Share


class DART(PruningMethod):
    """Before decoder layer ``layer`` each image keeps ``floor(keep * n)`` of its n tokens: pivots, whose keys have the
    largest L1 norm, and for each pivot, the tokens least similar to it. Pivots are visual tokens, which are kept, and
    tokens of the question.

    Args:
        layer: K of the paper, the layer before which tokens are dropped, counted from 0, at least 1. ``None``: 2 of 32,
            scaled to the depth.
        keep: keep ratio, in (0, 1].
        image_pivots: visual tokens of each image that are pivots.
        text_pivots: tokens of the question (the text between the last image and the answer) that are pivots.
        rank_with: whose keys select the pivots: ``this_layer``, the last layer with all tokens (as published; no extra
            cost), or ``next_layer``.
        positions: ``keep`` keeps the positions of the kept tokens (published); ``renumber`` numbers them 0, 1, ...
    """

    layer: PositiveInt | None = None
    keep: Share = 0.25
    image_pivots: PositiveInt = 4
    text_pivots: NonNegativeInt = 4
    rank_with: RankWith = "this_layer"
    positions: Positions = "keep"

    name = "dart"
    paper = (
        "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More (arXiv 2502.11494)"
    )

    @property
    def needs(self) -> Needs:
        return Needs(rank_with=self.rank_with, positions=self.positions)

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        layer = scaled_layers((2,), 32, num_layers)[0] if self.layer is None else self.layer
        check_layer("layer", layer, num_layers, least=1)
        return (Drop(layer, self.keep, queries="instruction"),)

    @torch.no_grad()
    def choose(self, candidates: Candidates) -> Selection:
        boundary, ranking = candidates.boundary, candidates.ranking
        assert ranking is not None, "needs.rank_with asks for it"
        norms_T = ranking.keys.float().abs().sum(dim=(1, 2))
        hidden_VC, instruction_QC = (unit(part) for part in (candidates.hidden, candidates.instruction))
        chosen = [boundary.span_of_visual[:0]]
        for span, segment, visual, key_rows in images_at(boundary):
            asked = slice(segment.query_start, segment.query_end)
            asking = _largest(norms_T.index_select(0, boundary.query_rows[asked]), self.text_pivots)
            pivots = _largest(norms_T.index_select(0, key_rows), min(self.image_pivots, span.after))
            hidden_NC = hidden_VC[visual]
            pivots_PC = torch.cat([hidden_NC.index_select(0, pivots), instruction_QC[asked].index_select(0, asking)])
            chosen.append(visual.start + least_duplicated(pivots_PC @ hidden_NC.T, pivots, span.after))
        return Selection(torch.cat(chosen))

    def selector_flops(self, hidden: int, boundary: Boundary) -> float:
        pivots = self.image_pivots + self.text_pivots
        return sum(2.0 * hidden * pivots * span.before for span in boundary.spans)


def unit(hidden: Tensor) -> Tensor:
    """Unit vectors, float32, without gradients."""
    return normalize(hidden.detach().float(), dim=-1)


def least_duplicated(similarity_PN: Tensor, pivots: Tensor, count: int) -> Tensor:
    """Select the visual tokens of one image.

    Args:
        similarity_PN: cosine similarity of each pivot (those of the image first) to each token.
        pivots: [p] int64, the image's own pivots, which are selected; p is at most ``count``.
        count: number of tokens to select.

    Returns:
        [count] int64 ascending. Each pivot in turn adds an equal share of the missing tokens (rounded up), those least
        similar to it that are not yet selected; ties go to the earlier token.
    """
    taken = torch.zeros(similarity_PN.shape[1], dtype=torch.bool, device=pivots.device).index_fill(0, pivots, True)
    chosen, missing = [pivots], count - len(pivots)
    share = -(-missing // max(len(similarity_PN), 1))
    for similarity_N in similarity_PN:
        added = min(share, missing)
        if not added:
            break
        least = torch.sort(similarity_N.masked_fill(taken, torch.inf), stable=True).indices[:added]
        taken = taken.index_fill(0, least, True)
        chosen.append(least)
        missing -= added
    return torch.sort(torch.cat(chosen)).values


def _largest(norms: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest norms (all, if there are fewer), by descending norm; ties go to the earlier."""
    return torch.sort(norms, descending=True, stable=True).indices[:count]
