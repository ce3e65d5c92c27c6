"""SparseVLM (arXiv 2410.04417) and SparseVLM+: visual tokens are scored by the text tokens most similar to the image;
the best dropped tokens are recycled as cluster means.

Shape suffixes: V visual tokens of a segment or span, Q instruction rows of a segment, H query heads, C hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from vtprune_train.core.rounding import as_fraction, floor_of
from vtprune_train.core.stream import Boundary, Drop
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.needs import MultiTurn, Needs, Positions
from vtprune_train.pruning.ops.raters import numerical_rank, raters_per_segment, rating_attention
from vtprune_train.pruning.ops.recycling import Recycle, SparseDrop, keep_and_recycle, recycled
from vtprune_train.pruning.ops.scoring import tokens_holding, visual_per_segment
from vtprune_train.pruning.schedules.budget import bisected, first_that_fits
from vtprune_train.pruning.schedules.stages import check_schedule, earlier, one_per_layer, scaled_layers
from vtprune_train.pruning.setting_types import Share

Count = Literal["fixed", "rank", "mass"]
TOKENS, DEPTH = 576, 32  # depth of LLaVA-1.5-7B, the model the published counts and layers refer to
LAYERS = {3: (2, 6, 15), 4: (2, 6, 15, 19)}  # v1.5 and v1.0
BUDGETS = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
BUDGETS_UNRECYCLED = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}


class SparseVLM(PruningMethod):
    """Score visual tokens with attention from selected instruction tokens (raters) in a few layers, and drop tokens
    after those layers.

    Args:
        layers: layers, counted from 0 and increasing, whose attention scores the tokens and after which tokens are
            dropped. ``None``: 2, 6, 15 of 32 (v1.5), or 2, 6, 15, 19 if ``keep`` has four entries (v1.0), scaled to the
            depth.
        count: how many tokens to keep: ``fixed``, as set by ``budget`` or ``keep``; ``rank``, drop ``scale`` times the
            excess of the token count over the rank of the raters' attention matrix; ``mass``, keep the fewest tokens
            that hold ``mass`` of the attention.
        budget: one of the published budgets: 192, 128, 96 or 64 of 576 tokens, averaged over layers. ``None``: use
            ``keep``, or 192 if that is not set either.
        keep: for ``fixed``, keep ratio at each layer relative to the original tokens, not counting recycled ones;
            non-increasing, in (0, 1].
        scale: the paper's lambda, in [0, 1]: of n excess tokens, floor(scale * n) are dropped.
        mass: attention mass to keep with ``count='mass'``, in (0, 1].
        recycle: how clusters of the best 30 % of the dropped tokens are merged: ``mean`` (published code) or ``sum``
            (paper); ``none`` disables recycling (SparseVLM+).
        positions: ``renumber`` (v1.x) or ``keep`` (SparseVLM+).
        heads: share of the heads used for scoring, those with the most attention from raters to visual tokens
            (SparseVLM+: 14 of 32); 1 uses all.
        gravity: divide attention by the position-only attention (SparseVLM+).
        multi_turn: see :class:`~vtprune_train.pruning.methods.pyramiddrop.PyramidDrop`.
    """

    layers: tuple[int, ...] | None = None
    count: Count = "fixed"
    budget: int | None = None
    keep: tuple[float, ...] | None = None
    scale: Annotated[float, Field(ge=0, le=1)] = 0.5
    mass: Share = 0.9
    recycle: Recycle = "mean"
    positions: Positions = "renumber"
    heads: Share = 1.0
    gravity: bool = False
    multi_turn: MultiTurn = "drop"

    name = "sparsevlm"
    drops_after = 1
    paper = "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference (arXiv 2410.04417)"
    trains = "yes; gradients reach recycled tokens too"

    def __post_init__(self) -> None:
        if self.budget not in (None, *BUDGETS):
            raise ValueError(
                f"budget={self.budget!r} is not one of {', '.join(map(str, BUDGETS))}; or set keep instead"
            )
        self._check_counts()
        self._check_layers()

    def _check_counts(self) -> None:
        settings = [setting for setting in ("budget", "keep") if getattr(self, setting) is not None]
        if settings and self.count != "fixed":
            value = getattr(self, settings[0])
            raise ValueError(f"{settings[0]}={value} has no effect with count={self.count}; leave it out, or use fixed")
        for setting, count in (("scale", "rank"), ("mass", "mass")):
            if self.count != count and (value := getattr(self, setting)) != getattr(type(self), setting):
                raise ValueError(f"{setting}={value} has no effect with count={self.count}; use count={count}")
        if len(settings) == 2:
            raise ValueError(
                f"budget={self.budget} and keep={list(self.keep or ())} exclude each other; set one of them"
            )
        check_schedule(None, self.shares)
        if self.layers is None and len(self.shares) not in LAYERS:
            raise ValueError(
                f"keep={list(self.shares)} has {len(self.shares)} entries, but default layers exist for 3 or 4; set "
                "layers too"
            )

    def _check_layers(self, num_layers: int | None = None) -> None:
        layers = self.layers
        if layers is None:
            return
        if any(later <= earlier for earlier, later in pairwise((-1, *layers))) or not layers:
            raise ValueError(f"layers={list(layers)} must be increasing and at least 0 (for example [2, 6, 15])")
        if self.count == "fixed" and len(layers) != len(self.shares):
            raise ValueError(f"layers={list(layers)} has {len(layers)} entries but keep has {len(self.shares)}")
        if num_layers is not None and layers[-1] >= num_layers - 1:
            raise ValueError(
                f"layers={list(layers)}: no layer after layer {layers[-1]} would see fewer tokens, because the decoder "
                f"has {num_layers} layers (counted from 0); use layers below {num_layers - 1}"
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """Keep ratios for ``count='fixed'``, relative to the original tokens and not counting recycled tokens."""
        if self.keep is not None:
            return self.keep
        published = BUDGETS_UNRECYCLED if self.recycle == "none" else BUDGETS
        return tuple(kept / TOKENS for kept in published[self.budget or max(published)])

    @property
    def needs(self) -> Needs:
        return Needs(
            rank_with="this_layer",  # v1.x and SparseVLM+ drop tokens from the output of the scoring layer
            positions=self.positions,
            gravity=self.gravity,
            multi_turn=self.multi_turn,
        )

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        self._check_layers(num_layers)
        after = [layer + 1 for layer in self.layers or LAYERS[len(self.shares)]]
        if self.layers is None:
            after = list(scaled_layers(after, DEPTH, num_layers))
        same: dict[str, Any] = {"queries": "instruction", "recycles": self.recycle != "none"}
        if self.count == "fixed":
            drops = [SparseDrop(layer, share, **same) for layer, share in zip(after, self.shares, strict=True)]
        else:
            share = float(1 - as_fraction(self.scale)) if self.count == "rank" else self.mass
            same |= {"adaptive": True, "of_present": share}
            drops = [SparseDrop(layer, share**n, **same) for n, layer in enumerate(sorted(set(after)), start=1)]
        return (Drop(0, 1.0, queries="instruction", ranked=False), *one_per_layer(drops))

    def for_budget(self, share: float, num_layers: int) -> PruningMethod:
        if self.count == "rank":
            return bisected(lambda left: replace(self, scale=1 - left), 0.0, 1.0, share, num_layers)
        if self.count == "mass":
            return bisected(lambda mass: replace(self, mass=mass), 1e-3, 1.0, share, num_layers)
        return first_that_fits(self._earlier(num_layers), share, num_layers)

    def _earlier(self, num_layers: int) -> Iterator[PruningMethod]:
        yield (scaled := replace(self, budget=None, keep=self.shares))
        after = [drop.layer for drop in self.drops(num_layers)[1:]]
        if len(after) == len(self.shares):
            for layers in earlier(after):
                yield replace(scaled, layers=tuple(layer - 1 for layer in layers))

    @property
    def ratios(self) -> tuple[float, ...]:
        return {"fixed": self.shares, "rank": (1 - self.scale,), "mass": (self.mass,)}[self.count]

    def eased(self, start: float, progress: float) -> PruningMethod:
        if self.count == "rank":
            return replace(self, scale=1 - start + (self.scale - 1 + start) * progress)
        if self.count == "mass":
            return replace(self, mass=start + (self.mass - start) * progress)
        return PruningMethod.eased(replace(self, budget=None, keep=self.shares), start, progress)

    def choose(self, candidates: Candidates) -> Selection:
        drop, spans = candidates.boundary.drop, candidates.boundary.spans
        if not drop.ranked:
            candidates.memory["raters"] = raters_per_segment(candidates)
            return Selection(torch.arange(len(candidates.hidden), device=candidates.hidden.device))
        assert isinstance(drop, SparseDrop)
        with torch.no_grad():
            attention = rating_attention(candidates, candidates.memory["raters"], self.heads)
            left = [drop.left(span.original, span.before) for span in spans]
            if drop.adaptive and spans:
                left = torch.stack([self._left(rows) for rows in attention]).tolist()  # the only device-to-host copy
            scores = [rows.sum(dim=0) for rows in attention]
        return keep_and_recycle(candidates.hidden, scores, left, self.recycle, counted=drop.adaptive)

    def _left(self, attention_QV: Tensor) -> Tensor:
        """Scalar int64: number of an image's tokens to keep, from the raters' attention."""
        if self.count == "mass":
            return tokens_holding(attention_QV.sum(dim=0), self.mass)
        tokens = attention_QV.shape[1]
        return tokens - floor_of(self.scale, tokens - numerical_rank(attention_QV))

    def selector_flops(self, hidden: int, boundary: Boundary) -> float:
        drop, spans = boundary.drop, boundary.spans
        if not isinstance(drop, SparseDrop):
            rows = [segment.query_end - segment.query_start for segment in boundary.segments]
            return sum(2.0 * q * v * hidden for q, v in zip(rows, visual_per_segment(boundary), strict=True))
        pools = [recycled(span.before - drop.left(span.original, span.before)) for span in spans]
        return sum(3.0 * n * n * hidden + 2.0 * n * m * hidden for n, m in pools) if drop.recycles else 0.0
