"""HiDrop (arXiv 2602.23699): late injection of visual tokens, concave pyramid pruning, early exit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from vtprune_train.core.stream import Boundary, Drop
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.needs import Needs
from vtprune_train.pruning.ops.scoring import mean_query_attention
from vtprune_train.pruning.ops.selection import all_candidates, top_k_per_span
from vtprune_train.pruning.schedules.budget import first_that_fits
from vtprune_train.pruning.schedules.stages import AtLeastOne, check_schedule, one_per_layer, scaled_layers

DEPTH = 32  # number of layers in the published model
ENTER, LAYERS, LEAVE = 8, (10, 14, 16, 18), 24
LEAST_SPREAD = 0.01  # epsilon relative to the mean, so that nearly equal scores do not cause exploding gradients
KEEP = (215 / 576, 10 / 576, 5 / 576, 1 / 576)


def gates(scores_V: Tensor, boundary: Boundary, temperature: float) -> Tensor:
    """[V] float32 soft keep gates: a sigmoid of each score's distance to the keep/drop threshold.

    Scores are standardized per image; the threshold is halfway between the lowest kept and the highest dropped score.
    The standard deviation and the threshold are constants in the backward pass. If an image keeps all or none of its
    tokens, its gates have no gradient.

    Args:
        scores_V: [V] float32, with gradients.
        boundary: provides the number of kept tokens per image.
        temperature: in standard deviations; smaller values confine the gradient to tokens near the threshold.
    """
    gates_of, start = [scores_V.new_zeros(0)], 0
    for span in boundary.spans:
        scores = scores_V[start : start + span.before]
        start += span.before
        if not 0 < span.after < span.before:
            gates_of.append(torch.ones_like(scores))
            continue
        fixed = scores.detach()
        edge = fixed.topk(span.after + 1).values[-2:].mean()
        unit = torch.maximum(fixed.std(), LEAST_SPREAD * fixed.mean()).clamp(min=1e-12)
        gates_of.append(torch.sigmoid((scores - edge) / (unit * temperature)))
    return torch.cat(gates_of)


class HiDrop(PruningMethod):
    """The first layers process text only. Visual tokens enter before layer ``enter`` (unchanged projector outputs), are
    pruned before ``layers``, and are removed before layer ``leave``. Layers are counted from 0.

    Args:
        enter: layer before which visual tokens enter; ``None`` means 8 of 32 layers, scaled to the depth; 0 means from
            the start.
        layers: where tokens are pruned, after ``enter``. ``None``: 10, 14, 16 and 18 of 32, scaled.
        keep: keep ratios relative to each image's tokens, non-increasing; at least one token per image is kept.
            Published as counts of 576: 215, 10, 5 and 1.
        leave: layer before which visual tokens are removed; ``None`` means 24 of 32, scaled; a value >= num_layers
            means never.
        differentiable: during training, pass gradients to the scores through the kept tokens with a straight-through
            gate (forward values are unchanged).
        temperature: gate temperature, see :func:`gates`.
    """

    enter: NonNegativeInt | None = None
    layers: tuple[int, ...] | None = None
    keep: tuple[float, ...] = KEEP
    leave: PositiveInt | None = None
    differentiable: bool = True
    temperature: PositiveFloat = 1.0

    name = "hidrop"
    paper = (
        "HiDrop: Hierarchical Vision Token Reduction in MLLMs via Late Injection, Concave Pyramid Pruning, "
        "and Early Exit (arXiv 2602.23699)"
    )
    where = "late injection, pruning between layers, early exit"
    trains = "yes, designed for it; gradients reach the ranking"

    def __post_init__(self) -> None:
        check_schedule(self.layers, self.keep)
        if self.layers is None and len(self.keep) != len(LAYERS):
            raise ValueError(
                f"keep={list(self.keep)} has {len(self.keep)} entries, but the default layers {list(LAYERS)} have "
                "four; set layers too"
            )

    @property
    def needs(self) -> Needs:
        return Needs(rank_with="next_layer", differentiable=self.differentiable)

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        enter, leave = self._window(num_layers)
        layers = self.layers
        if layers is None:
            layers = tuple(max(layer, enter + 1) for layer in scaled_layers(LAYERS, DEPTH, num_layers))
        elif layers and (layers[0] <= enter or layers[-1] >= min(leave, num_layers)):
            raise ValueError(
                f"layers={list(layers)} must lie between enter={enter} and leave={min(leave, num_layers)} in a decoder "
                f"of {num_layers} layers; set enter and leave too"
            )
        pyramid = [AtLeastOne(layer, keep) for layer, keep in zip(layers, self.keep, strict=True)]
        within = [
            drop for drop in (*pyramid, Drop(leave, 0.0, ranked=False)) if drop.layer < min(num_layers, leave + 1)
        ]
        inside = one_per_layer(within)
        return (Drop(0, 0.0, ranked=False), Drop(enter, 1.0, returns=True, ranked=False), *inside) if enter else inside

    def _window(self, num_layers: int) -> tuple[int, int]:
        """Return the (enter, leave) layers; at least one layer must process visual tokens."""
        enter, leave = scaled_layers((ENTER, LEAVE), DEPTH, num_layers)
        enter = enter if self.enter is None else self.enter
        leave = max(leave, enter + 1) if self.leave is None else self.leave
        if not enter < min(leave, num_layers):
            raise ValueError(
                f"enter={enter}, leave={leave}: none of the {num_layers} layers would process visual tokens; set leave "
                "above enter"
            )
        return enter, leave

    def choose(self, candidates: Candidates) -> Selection:
        boundary = candidates.boundary
        if boundary.drop.returns:
            return Selection(all_candidates(boundary))
        if not boundary.drop.keep:
            return Selection(boundary.take)  # none
        soft = self.differentiable and candidates.training
        with torch.set_grad_enabled(soft):
            scores = mean_query_attention(candidates.ranking, boundary)
        chosen = top_k_per_span(scores.detach(), boundary.span_of_visual, boundary.take)
        if not soft:
            return Selection(chosen)
        gate = gates(scores, boundary, self.temperature).index_select(0, chosen)
        kept = candidates.hidden.index_select(0, chosen)
        nothing = (gate - gate.detach()).to(kept.dtype)  # zero in forward; carries the gate's gradient in backward
        return Selection(chosen, torch.arange(len(chosen), device=chosen.device), kept + kept * nothing[:, None])

    def for_budget(self, share: float, num_layers: int) -> PruningMethod:
        """Scale ``keep``; if the enter-to-leave window is too short for ``share``, raise ``leave`` first, then lower
        ``enter``."""
        return first_that_fits(self._wider(num_layers), share, num_layers)

    def _wider(self, num_layers: int) -> Iterator[PruningMethod]:
        yield self
        enter, leave = self._window(num_layers)
        for later in range(leave + 1, num_layers + 1):
            yield replace(self, leave=later)
        for earlier in range(enter - 1, -1, -1):
            yield replace(self, enter=earlier, leave=num_layers)
