"""VisPruner (arXiv 2412.01818): important tokens by the vision tower's attention, and diverse ones of the rest."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from vtprune_train.core.rounding import floor_of
from vtprune_train.core.stream import Boundary
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.methods.one_share import OneShare
from vtprune_train.pruning.needs import Needs
from vtprune_train.pruning.ops.diversity import without_duplicates
from vtprune_train.pruning.ops.significance import neutral, signals_of, sizes_before
from vtprune_train.pruning.setting_types import Share


class VisPruner(OneShare):
    """Each image keeps ``floor(keep * n)`` tokens: the most important ones, and those of the rest that remain after
    repeatedly removing duplicates.

    Args:
        keep: keep ratio, in (0, 1]; the published example keeps 128 of 576 tokens.
        important: share of important tokens among the kept ones (rounded down), in [0, 1].
        layer: layer of the vision tower whose attention is the importance; -1 is the layer whose output the projector
            receives.
        positions: ``renumber`` numbers the kept tokens 0, 1, ... (published); ``keep`` keeps their positions.
    """

    keep: Share = 128 / 576
    important: Annotated[float, Field(ge=0, le=1)] = 0.5
    layer: int = -1

    name = "vispruner"
    paper = (
        "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs (arXiv 2412.01818)"
    )

    @property
    def needs(self) -> Needs:
        return Needs(positions=self.positions, encoder_layers=(self.layer,), encoder_features=True)

    @torch.no_grad()
    def choose(self, candidates: Candidates) -> Selection:
        boundary, signals = candidates.boundary, signals_of(candidates, 1)
        assert signals.features is not None, "needs.encoder_features asks for them"
        sizes = sizes_before(boundary)
        scores = neutral(signals.attention[0], boundary).split(sizes)
        features, patch = signals.features.split(sizes), (signals.tile >= 0).split(sizes)
        chosen, first = [boundary.span_of_visual[:0]], 0
        for number, span in enumerate(boundary.spans):
            order = torch.sort(scores[number], descending=True, stable=True).indices
            count, diverse = self.counts(span.before, span.after)
            rest = order[count:]
            if diverse:
                features_NC, patch_N = (part[number].index_select(0, rest) for part in (features, patch))
                rest = rest.index_select(0, without_duplicates(features_NC, patch_N, diverse))
            chosen.append(first + torch.sort(torch.cat([order[:count], rest[:diverse]])).values)
            first += span.before
        return Selection(torch.cat(chosen))

    def counts(self, before: int, after: int) -> tuple[int, int]:
        """Numbers of important and of diverse tokens of an image; all are important if all are kept."""
        important = after if before == after else floor_of(self.important, after)
        return important, after - important

    def selector_flops(self, hidden: int, boundary: Boundary) -> float:
        spans = boundary.spans
        compared = [(s.before - counts[0]) ** 2 for s in spans if (counts := self.counts(s.before, s.after))[1]]
        return 2.0 * hidden * sum(compared)  # similarities, assuming that features have the decoder's hidden size
