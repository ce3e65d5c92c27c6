"""VideoLLM-MoD (arXiv 2408.16730): in some layers a learned router selects the visual tokens to process; the others
skip the layer."""

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
    """In each of ``layers``, only the fraction ``keep`` of an image's tokens with the highest router scores is
    processed, with the layer's update scaled by the score; the other tokens are passed through unchanged.

    Args:
        layers: routed decoder layers, counted from 0, increasing; the decoder's last layer cannot be routed. ``None``:
            every second layer, starting with layer 1.
        keep: fraction of each image's tokens that a routed layer processes, in (0, 1]; 1 disables routing.
    """

    layers: tuple[int, ...] | None = None
    keep: Share = 0.2

    name = "videollm_mod"
    paper = (
        "VideoLLM-MoD: Efficient Video-Language Streaming with Mixture-of-Depths Vision Computation (arXiv 2408.16730)"
    )
    where = "skips layers"
    trains = "yes, required: the routers are learned"

    def __post_init__(self) -> None:
        if self.layers is None:
            return
        if not self.layers or any(later <= earlier for earlier, later in pairwise((-1, *self.layers))):
            raise ValueError(f"layers={list(self.layers)} must be increasing and at least 0 (for example [1, 3, 5])")

    def routed(self, num_layers: int) -> tuple[int, ...]:
        """Return the routed layers; empty if ``keep`` is 1.

        Raises:
            ValueError: the decoder's last layer is routed.
        """
        layers = self.layers or tuple(range(1, num_layers - 1, 2)) or (0,)
        if layers[-1] > num_layers - 2:
            raise ValueError(
                f"layers={list(layers)}: nothing would read what the router of layer {layers[-1]} decides, because the "
                f"decoder has {num_layers} layers (counted from 0); use layers up to {num_layers - 2}"
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
            assert isinstance(candidates.module, Routers), "the method's routers are missing"
            rating = candidates.module[str(boundary.layer)](candidates.hidden).squeeze(-1)  # [V]
            chosen = top_k_per_span(rating.detach().float(), boundary.span_of_visual, boundary.take)
            memory["let_in"], memory["gates"] = chosen, gate(rating.index_select(0, chosen))
            return Selection(chosen)
        let_in = memory["let_in"]
        before, after = (states.index_select(0, let_in) for states in (candidates.before, candidates.hidden))
        all_tokens = torch.arange(len(candidates.before), device=let_in.device)
        return Selection(all_tokens, at=let_in, values=before + memory["gates"].unsqueeze(-1) * (after - before))

    def for_budget(self, share: float, num_layers: int) -> PruningMethod:
        """Scale ``keep``; if routing every second layer cannot reach ``share``, route all layers except the first and
        last."""
        methods = [self] if self.layers else [self, replace(self, layers=tuple(range(1, num_layers - 1)) or None)]
        return first_that_fits(methods, share, num_layers)

    def selector_flops(self, hidden: int, boundary: Boundary) -> float:
        """FLOPs of the router projection; restoring tokens is negligible."""
        return 0.0 if boundary.drop.returns else 2.0 * hidden * len(boundary.visual_rows)


def gate(rating_K: Tensor) -> Tensor:
    """[K] multiplier in (0, 2) for the layer's residual update; a router score of 0 gives 1, so a pretrained decoder is
    initially unchanged."""
    return 2.0 * torch.sigmoid(rating_K)
