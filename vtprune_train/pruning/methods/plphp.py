"""PLPHP (arXiv 2502.14504): after the prefill, every head of every layer keeps its own subset of the visual keys and
values."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from vtprune_train.core.rounding import as_fraction, floor_of
from vtprune_train.core.stream import Boundary
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Ranking
from vtprune_train.pruning.needs import MultiTurn, Needs
from vtprune_train.pruning.ops.per_head import judged_attention, keep_best, of_visual, span_sizes
from vtprune_train.pruning.schedules.budget import bisected
from vtprune_train.pruning.schedules.stages import scaled_layers


def vision_attention(ranking: Ranking, boundary: Boundary) -> tuple[Tensor, Tensor, Tensor]:
    """Per-head attention to each visual token, and the layer's overall attention to vision.

    An image is scored with the first query row after it; in a prompt, that is the last prompt token.

    Returns:
        [G, V] float32, the attention of each visual token, averaged over the query heads of each key-value head;
        [V] int64, index of the query row used for each token; [Q] float32 gamma, each query row's total attention to
        the visual tokens it scores, averaged over heads.
    """
    scores, judges = [], []
    for segment, (weights_GQL, judge_L) in zip(boundary.segments, judged_attention(ranking, boundary), strict=True):
        scores.append(weights_GQL.gather(1, judge_L.expand(len(weights_GQL), 1, -1)).squeeze(1))
        judges.append(judge_L + segment.query_start)
    scores_GV, judge_V = of_visual(scores, boundary), of_visual(judges, boundary)
    gamma_Q = torch.zeros(len(ranking.queries), device=scores_GV.device).index_add(0, judge_V, scores_GV.mean(dim=0))
    return scores_GV, judge_V, gamma_Q


class PLPHP(PruningMethod):
    """Prune the KV cache after prefill: the rate of each layer depends on how much it attends to vision, and each head
    keeps the keys it attends to most. Prefill uses all tokens and is not faster.

    Args:
        keep: keep ratio r of layers that are neither attentive nor indifferent: each head keeps ``floor(r * n)`` of an
            image's n tokens (exactly, see :mod:`vtprune_train.core.rounding`).
        delta: a vision-attentive layer keeps ``keep + delta``, a vision-indifferent one ``keep - delta``.
        alpha: a layer is vision-attentive if its attention to vision is at least alpha.
        beta: a layer is vision-indifferent below this share of attention.
        untouched: number of initial layers that are not pruned; ``None``: two of 32, scaled to the depth, at least one.
        multi_turn: which tokens of earlier images later turns see: ``drop``, only those that each head kept;
            ``keep_dense``, all of them, ranked again with the new question.
    """

    keep: Annotated[float, Field(ge=0, le=1)] = 0.4
    delta: float = 0.3
    alpha: Annotated[float, Field(allow_inf_nan=False)] = 0.25
    beta: Annotated[float, Field(allow_inf_nan=False)] = 0.1
    untouched: NonNegativeInt | None = None
    multi_turn: MultiTurn = "drop"

    name = "plphp"
    paper = (
        "PLPHP: Per-Layer Per-Head Vision Token Pruning for Efficient Large Vision-Language Models (arXiv 2502.14504)"
    )
    where = "key-value cache"
    trains = "yes, as a mask for each head, consistent with inference; saves no FLOPs"

    def __post_init__(self) -> None:
        within = 0.0 <= self.delta <= self.keep
        if not within or (self.keep + self.delta > 1.0 and as_fraction(self.keep) + as_fraction(self.delta) > 1):
            raise ValueError(
                f"delta={self.delta}: keep - delta and keep + delta must lie in [0, 1]; with keep={self.keep} use at "
                f"most {min(self.keep, 1.0 - self.keep):g}"
            )
        if self.beta > self.alpha:
            raise ValueError(
                f"beta={self.beta} is larger than alpha={self.alpha}; layers below beta are indifferent and layers at "
                "or above alpha are attentive"
            )

    @property
    def needs(self) -> Needs:
        return Needs(multi_turn=self.multi_turn)

    def key_layers(self, num_layers: int) -> tuple[int, ...]:
        first = scaled_layers((2,), 32, num_layers)[0] if self.untouched is None else self.untouched
        if first >= num_layers:
            raise ValueError(
                f"untouched={first} leaves no layer to prune in a decoder of {num_layers} layers; use at most "
                f"{num_layers - 1}"
            )
        return tuple(range(first, num_layers))

    def keys(self, layer: int, ranking: Ranking, boundary: Boundary) -> Tensor:
        scores_GV, judge_V, gamma_Q = vision_attention(ranking, boundary)
        span_V = boundary.span_of_visual
        num_spans = len(boundary.spans)
        judge_S = torch.zeros(num_spans, dtype=torch.int64, device=span_V.device).scatter(0, span_V, judge_V)
        counts = self.counts(gamma_Q.index_select(0, judge_S), span_sizes(span_V, num_spans))
        return keep_best(scores_GV, span_V, counts)

    def counts(self, gamma: Tensor, sizes: Tensor) -> Tensor:
        """int64, number of tokens a head keeps for spans of ``sizes`` tokens, in a layer whose attention to vision is
        ``gamma``."""
        keep, delta = as_fraction(self.keep), as_fraction(self.delta)
        low, middle, high = (floor_of(rate, sizes) for rate in (keep - delta, keep, min(keep + delta, Fraction(1))))
        return torch.where(gamma >= self.alpha, high, torch.where(gamma < self.beta, low, middle))

    def input_share(self, num_layers: int) -> float:
        """Share of visual keys read during decoding, assuming as many attentive as indifferent layers. All tokens
        enter every layer."""
        pruned = len(self.key_layers(num_layers))
        return (num_layers - pruned + pruned * self.keep) / num_layers

    def for_budget(self, share: float, num_layers: int) -> PLPHP:
        """Scale ``keep``, and ``delta`` along with it as long as the rates stay in [0, 1].

        Raises:
            ValueError: the unpruned layers alone exceed the budget.
        """

        def scaled(keep: float) -> PLPHP:
            relative = self.delta / self.keep if self.keep else 0.0
            return replace(self, keep=keep, delta=min(keep * relative, keep, 1.0 - keep))

        return bisected(scaled, 0.0, 1.0, share, num_layers)

    def eased(self, start: float, progress: float) -> PLPHP:
        keep = start + (self.keep - start) * progress
        return replace(self, keep=keep, delta=min(self.delta * progress, keep, 1.0 - keep))
