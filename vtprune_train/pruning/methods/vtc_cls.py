"""VTC-CLS (arXiv 2412.05819): the class token's attention, summed over several layers of the vision tower."""

from __future__ import annotations

from pydantic import PositiveInt
from torch import Tensor

from vtprune_train.pruning.candidates import Candidates
from vtprune_train.pruning.methods.one_share import OneShare
from vtprune_train.pruning.needs import Needs
from vtprune_train.pruning.ops.significance import neutral, signals_of
from vtprune_train.pruning.setting_types import Share


class VTCCLS(OneShare):
    """Each image keeps the ``floor(keep * n)`` tokens that the tower's class token attends to most.

    Args:
        keep: keep ratio, in (0, 1].
        layers: number of vision-tower layers to sum over, counted back from the layer that feeds the projector; all
            layers if the tower has fewer.
        positions: ``renumber`` numbers the kept tokens 0, 1, ... (published); ``keep`` keeps their positions.
    """

    keep: Share = 0.25
    layers: PositiveInt = 8

    name = "vtc_cls"
    paper = "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs (arXiv 2412.05819)"

    @property
    def needs(self) -> Needs:
        return Needs(positions=self.positions, encoder_layers=tuple(range(-self.layers, 0)))

    def score(self, candidates: Candidates) -> Tensor:
        attention = signals_of(candidates, self.layers).attention
        return neutral(attention.sum(dim=0), candidates.boundary)
