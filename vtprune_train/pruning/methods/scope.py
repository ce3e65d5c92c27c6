"""SCOPE (arXiv 2510.24214): salient visual tokens that together cover the image, before the decoder."""

from __future__ import annotations

import torch
from pydantic import NonNegativeFloat

from vtprune_train.core.stream import Boundary
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.methods.one_share import OneShare
from vtprune_train.pruning.needs import Needs
from vtprune_train.pruning.ops.diversity import covering
from vtprune_train.pruning.ops.significance import neutral, signals_of, sizes_before
from vtprune_train.pruning.setting_types import Share


class SCOPE(OneShare):
    """Each image keeps ``floor(keep * n)`` tokens, selected greedily: each step adds the token with the largest product
    of saliency (the vision tower's attention) and added coverage of the image.

    Args:
        keep: keep ratio, in (0, 1]; the published examples keep 64 of 576 tokens.
        alpha: exponent of the saliency, at least 0; 0 selects by coverage alone.
        layer: layer of the vision tower whose attention is the saliency; -1 is the layer whose output the projector
            receives.
        positions: ``renumber`` numbers the kept tokens 0, 1, ... (published); ``keep`` keeps their positions.
    """

    keep: Share = 64 / 576
    alpha: NonNegativeFloat = 1.0
    layer: int = -1

    name = "scope"
    paper = "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs (arXiv 2510.24214)"

    @property
    def needs(self) -> Needs:
        return Needs(positions=self.positions, encoder_layers=(self.layer,), encoder_features=True)

    def choose(self, candidates: Candidates) -> Selection:
        boundary, signals = candidates.boundary, signals_of(candidates, 1)
        assert signals.features is not None, "needs.encoder_features asks for them"
        with torch.no_grad():
            saliency = neutral(signals.attention[0], boundary) ** self.alpha
            take = [span.after for span in boundary.spans]
            return Selection(covering(signals.features, saliency, sizes_before(boundary), take))

    def selector_flops(self, hidden: int, boundary: Boundary) -> float:
        # similarities, assuming that features have the decoder's hidden size; gains of each step
        return sum(span.before**2 * (2.0 * hidden + 3.0 * span.after) for span in boundary.spans)
