"""VideoLLM-MoD (arXiv 2408.16730): learned routers let the best visual tokens into some layers; the rest skip them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from vtprune_train.core.stream import Boundary, Drop
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.learned import Routers
from vtprune_train.pruning.needs import Needs
from vtprune_train.pruning.ops.selection import top_k_per_span
from vtprune_train.pruning.schedules.budget import first_that_fits
from vtprune_train.pruning.setting_types import Share


class VideoLLMMoD(PruningMethod):
    """In each of ``layers`` only the share ``keep`` of an image's tokens that the layer's router rates highest runs
    through the layer, by as much as it rates them; the others stay what they were.

    Args:
        layers: decoder layers, counted from 0, that tokens may skip, increasing; a layer must follow the last.
            ``None``: every second layer, from layer 1 on.
        keep: share of each image's tokens that a layer lets in, in (0, 1]; at 1 nothing skips and nothing is learned.
    """

    layers: tuple[int, ...] | None = None
    keep: Share = 0.2

    name = "videollm_mod"
    paper = (
        "VideoLLM-MoD: Efficient Video-Language Streaming with Mixture-of-Depths Vision Computation (arXiv 2408.16730)"
    )
    where = "skips layers"
    trains = "yes, and must be: the routers are learned"

    def __post_init__(self) -> None:
        if self.layers is None:
            return
        if not self.layers or any(later <= earlier for earlier, later in pairwise((-1, *self.layers))):
            raise ValueError(f"layers={list(self.layers)} must increase, from 0 on (for example [1, 3, 5])")

    def routed(self, num_layers: int) -> tuple[int, ...]:
        """The layers that tokens may skip; none if all tokens are let in.

        Raises:
            ValueError: there is no layer after the last of them.
        """
        layers = self.layers or tuple(range(1, num_layers - 1, 2)) or (0,)
        if layers[-1] > num_layers - 2:
            raise ValueError(
                f"layers={list(layers)}: no layer follows layer {layers[-1]} in a decoder of {num_layers}, so nothing "
                f"reads what its router decides; use layers up to {num_layers - 2}"
            )
        return layers if self.keep < 1.0 else ()

    @property
    def needs(self) -> Needs:
        return Needs(differentiable=True)

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        pairs = ((Drop(n, self.keep), Drop(n + 1, 1.0, returns=True)) for n in self.routed(num_layers))
        return tuple(drop for pair in pairs for drop in pair)

    def module(self, hidden: int, num_layers: int) -> nn.Module | None:
        layers = self.routed(num_layers)
        return Routers(layers, hidden) if layers else None

    def choose(self, candidates: Candidates) -> Selection:
        boundary, memory = candidates.boundary, candidates.memory
        if not boundary.drop.returns:
            assert isinstance(candidates.module, Routers), "the routers that this method asked for are not there"
            rating = candidates.module[str(boundary.layer)](candidates.hidden).squeeze(-1)  # [V]
            chosen = top_k_per_span(rating.detach().float(), boundary.span_of_visual, boundary.take)
            memory["let_in"], memory["gates"] = chosen, gate(rating.index_select(0, chosen))
            return Selection(chosen)
        let_in = memory["let_in"]
        before, after = (states.index_select(0, let_in) for states in (candidates.before, candidates.hidden))
        everything = torch.arange(len(candidates.before), device=let_in.device)
        return Selection(everything, at=let_in, values=before + memory["gates"].unsqueeze(-1) * (after - before))

    def for_budget(self, share: float, num_layers: int) -> PruningMethod:
        """Scales ``keep``; where every second layer is too few for ``share``, all but the first and last are routed."""
        methods = [self] if self.layers else [self, replace(self, layers=tuple(range(1, num_layers - 1)) or None)]
        return first_that_fits(methods, share, num_layers)

    def selector_flops(self, hidden: int, boundary: Boundary) -> float:
        """The router's products; bringing tokens back costs nothing to speak of."""
        return 0.0 if boundary.drop.returns else 2.0 * hidden * len(boundary.visual_rows)


def gate(rating_K: Tensor) -> Tensor:
    """[K], how much of a layer's change a token takes: 1 for a rating of 0, so that a pretrained decoder starts as it
    was; between 0 and 2."""
    return 2.0 * torch.sigmoid(rating_K)
