"""DivPrune (arXiv 2503.02175): the visual tokens that differ most from each other, before the decoder."""

from __future__ import annotations

import torch

from vtprune_train.core.stream import Boundary
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.methods.one_share import OneShare
from vtprune_train.pruning.ops.diversity import max_min_diverse
from vtprune_train.pruning.setting_types import Share


class DivPrune(OneShare):
    """Each image keeps ``floor(keep * n)`` tokens, chosen greedily to maximize the minimum pairwise cosine distance.
    Uses neither the question nor the vision tower's attention.

    Args:
        keep: keep ratio, in (0, 1]; the paper goes down to 0.098.
        positions: ``renumber`` numbers the kept tokens 0, 1, ... (published); ``keep`` keeps their positions.
    """

    keep: Share = 0.098

    name = "divprune"
    paper = "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models (arXiv 2503.02175)"

    def choose(self, candidates: Candidates) -> Selection:
        spans = candidates.boundary.spans
        with torch.no_grad():
            sizes, take = [span.before for span in spans], [span.after for span in spans]
            return Selection(max_min_diverse(candidates.hidden.detach(), sizes, take))

    def selector_flops(self, hidden: int, boundary: Boundary) -> float:
        return sum(2.0 * hidden * span.before * (span.before + span.after) for span in boundary.spans)
