"""Text interaction (arXiv 2409.01162): the class token's attention decides how many tokens an image needs before the
decoder, the instruction's attention which of them stay after the first layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from vtprune_train.core.rounding import floor_of
from vtprune_train.core.stream import Boundary, Drop
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.needs import Needs, Positions, RankWith
from vtprune_train.pruning.ops.scoring import mean_query_attention
from vtprune_train.pruning.ops.significance import signals_of, sizes_before
from vtprune_train.pruning.schedules.budget import scaled_to_budget
from vtprune_train.pruning.schedules.stages import AtLeastOne, check_layer, scaled_layers
from vtprune_train.pruning.setting_types import Share

EXPECTED = 0.22  # reported mean share of tokens; what plans assume before the counts are known
LAYER, DEPTH = 2, 32


@dataclass(frozen=True)
class OfRemaining(Drop):
    """Keeps a share of the tokens that remain, whose number an adaptive drop decided; at least one."""

    share: float = 1.0

    def kept(self, length: int, before: int) -> int:
        return min(before, max(1, floor_of(self.share, before)))


class TextInteraction(PruningMethod):
    """Before the decoder, each image keeps the tokens above the bend of its sorted class-token attention (a variable
    number); before ``layer``, it keeps those of them that the instruction attends to most.

    Args:
        keep: fixed keep ratio before the decoder, in (0, 1] (floor, at least one token); ``None`` looks for the bend.
        layer: decoder layer before which tokens are dropped again; ``None`` means 2 of 32, scaled to the depth; 0
            disables this drop.
        remaining: share of the tokens that remain which the second drop keeps, in (0, 1] (floor, at least one).
        tower_layer: layer of the vision tower; -1 is the layer whose output the projector receives.
        rank_with: which layer's attention ranks at the second drop: ``this_layer``, the last one that has run, or
            ``next_layer``.
        positions: ``keep`` keeps the positions of the kept tokens; ``renumber`` numbers them 0, 1, ...
    """

    keep: Share | None = None
    layer: NonNegativeInt | None = None
    remaining: Share = 0.5
    tower_layer: int = -1
    rank_with: RankWith = "this_layer"
    positions: Positions = "keep"

    name = "text_interaction"
    paper = (
        "Sparsity Meets Similarity: Leveraging Long-Tail Distribution for Dynamic Optimized Token Representation in "
        "Multimodal Large Language Models (arXiv 2409.01162)"
    )
    where = "before the decoder and between layers"
    trains = "yes"

    @property
    def needs(self) -> Needs:
        return Needs(rank_with=self.rank_with, positions=self.positions, encoder_layers=(self.tower_layer,))

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        share = EXPECTED if self.keep is None else self.keep
        first = AtLeastOne(0, share, adaptive=self.keep is None, ranked=False)
        layer = scaled_layers((LAYER,), DEPTH, num_layers)[0] if self.layer is None else self.layer
        check_layer("layer", layer, num_layers)
        if not layer:
            return (first,)
        return first, OfRemaining(layer, share * self.remaining, queries="instruction", share=self.remaining)

    def for_budget(self, share: float, num_layers: int) -> PruningMethod:
        """Scale ``keep``."""
        return scaled_to_budget(replace(self, keep=self.keep or EXPECTED), share, num_layers)

    def choose(self, candidates: Candidates) -> Selection:
        if candidates.boundary.layer or self.keep is not None:
            return super().choose(candidates)
        boundary = candidates.boundary
        with torch.no_grad():
            scores, sizes = self.score(candidates), sizes_before(boundary)
            parts = scores.split(sizes)
            if not parts:
                return Selection(boundary.span_of_visual[:0], counts=torch.zeros(0, dtype=torch.int64))
            counts = torch.stack([tokens_above_bend(part) for part in parts]).cpu()  # the only copy to the host
            starts = torch.tensor([0, *sizes[:-1]]).cumsum(0).tolist()
            chosen = [
                start + torch.sort(torch.sort(part, descending=True, stable=True).indices[:count]).values
                for start, part, count in zip(starts, parts, counts.tolist(), strict=True)
            ]
        return Selection(torch.cat(chosen), counts=counts)

    def score(self, candidates: Candidates) -> Tensor:
        """[V] float32: class-token attention before the decoder, -1 for tokens that are not patches; attention of the
        instruction, averaged over heads and rows, between layers."""
        if candidates.boundary.layer:
            return mean_query_attention(candidates.ranking, candidates.boundary)
        return signals_of(candidates, 1).attention[0].nan_to_num(-1.0)

    def selector_flops(self, hidden: int, boundary: Boundary) -> float:
        return 0.0 if boundary.layer else 4.0 * sum(span.before for span in boundary.spans)


def tokens_above_bend(scores_n: Tensor) -> Tensor:
    """[] int64: number of tokens before the bend of the sorted scores, i.e. the point farthest below the straight line
    from the highest to the lowest score; at least one. All of them if no point is below that line. Negative scores
    (tokens that are not patches) do not count.

    Args:
        scores_n: [n] float32.
    """
    n = len(scores_n)
    if not n:
        return torch.zeros((), dtype=torch.int64, device=scores_n.device)
    patches = (scores_n >= 0).sum()
    ordered = torch.sort(scores_n.double(), descending=True).values
    rank = torch.arange(n, device=scores_n.device)
    lowest = torch.where(rank == patches - 1, ordered, 0.0).sum()
    line = ordered[0] + (lowest - ordered[0]) * rank / (patches - 1).clamp(min=1)
    below = torch.where(rank < patches, line - ordered, -1.0)
    bend = below.argmax()
    straight = below.amax() <= 1e-9 * ordered[0].abs()
    return torch.where(straight, patches, bend).clamp(min=1)
