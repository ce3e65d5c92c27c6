"""The baseline ``uniform``: an even grid of tokens."""

from __future__ import annotations

from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.methods.one_share import Baseline
from vtprune_train.pruning.ops.grids import even_cells, grids_of
from vtprune_train.pruning.ops.selection import picked_on_host


class Uniform(Baseline):
    """Keep floor(keep * n) tokens per image, evenly spaced over its grid in both dimensions.

    Args:
        keep: keep ratio, in (0, 1].
        layer: decoder layer before which tokens are dropped; 0: before the decoder.
        positions: ``keep`` keeps the positions of the kept tokens; ``renumber`` numbers them 0, 1, ...
    """

    name = "uniform"

    def choose(self, candidates: Candidates) -> Selection:
        return Selection(picked_on_host(candidates.boundary, lambda span: even_cells(grids_of(span), span.after)))
