"""HiPrune (arXiv 2508.00553): tokens of objects by a middle layer of the vision tower, their neighbors, and tokens of
the whole image by a deep layer."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from vtprune_train.core.stream import SpanLayout, to_device
from vtprune_train.pruning.candidates import Candidates
from vtprune_train.pruning.methods.one_share import OneShare
from vtprune_train.pruning.needs import Needs
from vtprune_train.pruning.ops.grids import grids_of
from vtprune_train.pruning.ops.significance import neutral, signals_of, sizes_before
from vtprune_train.pruning.setting_types import Share

OBJECTS = 8 / 22  # published: layer 8 of CLIP-L, whose layer 22 feeds the projector


class HiPrune(OneShare):
    """Each image keeps ``floor(keep * n)`` tokens: anchors, which receive the most attention in a middle layer of the
    vision tower, the neighbors of each anchor, and the tokens that receive the most attention in the last layer.

    Args:
        keep: keep ratio, in (0, 1]; published settings are 192, 128 and 64 of 576.
        alpha: share of anchors and neighbors among the kept tokens, in [0, 1]; a fifth of it are anchors (rounded).
        object_layer: layer of the vision tower that selects the anchors, counted from 0; negative numbers count from
            the end. ``None``: 8 of CLIP-L's 23 layers, scaled to the depth.
        positions: ``renumber`` numbers the kept tokens 0, 1, ... (published); ``keep`` keeps their positions.
    """

    keep: Share = 192 / 576
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.1
    object_layer: int | None = None

    name = "hiprune"
    paper = (
        "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models "
        "(arXiv 2508.00553)"
    )

    @property
    def needs(self) -> Needs:
        objects = OBJECTS if self.object_layer is None else self.object_layer
        return Needs(positions=self.positions, encoder_layers=(objects, -1), encoder_rows="all")

    def score(self, candidates: Candidates) -> Tensor:
        """Attention in the last layer, which is at most 1, plus 1 for neighbors and 2 for anchors."""
        boundary, signals = candidates.boundary, signals_of(candidates, 2)
        middle, deep = (neutral(attention, boundary) for attention in (signals.attention[0], signals.attention[-1]))
        sizes, bonus = sizes_before(boundary), [deep[:0]]
        newlines = (signals.tile < 0).split(sizes)
        for span, objects, newline in zip(boundary.spans, middle.split(sizes), newlines, strict=True):
            anchors = torch.sort(objects, descending=True, stable=True).indices[: self.anchors(span.after)]
            around = to_device(neighbors(span), anchors.device).index_select(0, anchors).flatten()
            near = torch.zeros_like(objects).index_fill(0, around, 1.0).masked_fill(newline, 0.0)
            bonus.append(near.index_fill(0, anchors, 2.0))
        return deep + torch.cat(bonus)

    def anchors(self, after: int) -> int:
        """Number of anchors of an image that keeps ``after`` tokens, rounded half to even as published."""
        return round(after * self.alpha / 5)


def neighbors(span: SpanLayout) -> np.ndarray:
    """[n, 4] int64: the tokens before, after, above and below each token of an image, counted through its grid in
    row-major order and limited to it, so that the neighbor of a row's last token is the next row's first. Without a
    layout, only those before and after."""
    parts, first = [np.zeros((0, 4), dtype=np.int64)], 0
    for rows, columns in grids_of(span):
        size, width = rows * columns, columns if rows > 1 else 0
        cells = np.arange(size)[:, None] + np.array([-1, 1, -width, width])
        parts.append(first + cells.clip(0, max(size - 1, 0)))
        first += size
    return np.concatenate(parts)
