"""IDPruner (arXiv 2602.13315): visual tokens that are important and differ from each other, by maximal marginal
relevance."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from vtprune_train.core.stream import Boundary
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.methods.one_share import OneShare
from vtprune_train.pruning.needs import Needs
from vtprune_train.pruning.ops.diversity import marginally_relevant
from vtprune_train.pruning.ops.significance import neutral, signals_of, sizes_before
from vtprune_train.pruning.setting_types import Share

LEAST = 1e-6  # added to the range of an image's importance, which is 0 if all tokens are equally important


def importance(attention_V: Tensor, boundary: Boundary) -> Tensor:
    """[V] float32 in [0, 1]: the vision tower's attention, min-max normalized per image."""
    parts = [attention_V[:0]]
    for scores in neutral(attention_V, boundary).split(sizes_before(boundary)):
        if len(scores):
            low, high = scores.amin(), scores.amax()
            parts.append((scores - low) / (high - low + LEAST))
    return torch.cat(parts)


class IDPruner(OneShare):
    """Each image keeps ``floor(keep * n)`` tokens, selected greedily by maximal marginal relevance: importance minus
    the similarity to the tokens already selected.

    Args:
        keep: keep ratio, in (0, 1].
        balance: lambda of the paper, the weight of importance against similarity, in [0, 1].
        at_once: tokens selected per greedy step; more are faster and less exact.
        layer: layer of the vision tower whose attention is the importance; -1 is the layer whose output the projector
            receives.
        positions: ``renumber`` numbers the kept tokens 0, 1, ...; ``keep`` keeps their positions.
    """

    keep: Share = 0.25
    balance: Annotated[float, Field(ge=0, le=1)] = 0.5
    at_once: PositiveInt = 1
    layer: int = -1

    name = "idpruner"
    paper = "IDPruner: Harmonizing Importance and Diversity in Visual Token Pruning for MLLMs (arXiv 2602.13315)"

    @property
    def needs(self) -> Needs:
        return Needs(positions=self.positions, encoder_layers=(self.layer,))

    def choose(self, candidates: Candidates) -> Selection:
        boundary = candidates.boundary
        with torch.no_grad():
            weights = importance(signals_of(candidates, 1).attention[0], boundary)
            sizes, take = sizes_before(boundary), [span.after for span in boundary.spans]
            hidden = candidates.hidden.detach()
            return Selection(marginally_relevant(hidden, weights, sizes, take, self.balance, self.at_once))

    def selector_flops(self, hidden: int, boundary: Boundary) -> float:
        return sum(2.0 * hidden * span.after * span.before for span in boundary.spans)
