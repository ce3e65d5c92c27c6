"""VisionZip (arXiv 2412.04467): keeps dominant tokens by vision-tower attention and merges the rest into a few
contextual tokens.

Shape suffixes: n tokens of an image or tile, C hidden size, M input size of the projector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vtprune_train.core.rounding import floor_of
from vtprune_train.core.stream import Boundary, Drop, to_device
from vtprune_train.pruning.candidates import Candidates, EncoderSignals, Selection
from vtprune_train.pruning.methods.one_share import OneShare
from vtprune_train.pruning.needs import Needs, Variant
from vtprune_train.pruning.ops.grids import spread
from vtprune_train.pruning.ops.significance import (
    by_tile,
    merged,
    neutral,
    parts_of,
    projected,
    signals_of,
    sizes_before,
)
from vtprune_train.pruning.schedules.stages import AtLeastOne, OfEachTile
from vtprune_train.pruning.setting_types import Share


class VisionZip(OneShare):
    """Each image keeps ``floor(keep * n)`` tokens: dominant tokens unchanged, plus contextual tokens, each the mean of
    an evenly spaced remaining token and the remaining tokens most similar to it.

    Args:
        keep: keep ratio, in (0, 1]; published settings are 192, 128 and 64 of 576.
        contextual: share of the output tokens that are contextual (rounded down), in [0, 1]; the paper uses 30 of 192,
            20 of 128 and 10 of 64.
        layer: layer of the vision tower; -1 is the layer whose output the projector receives.
        positions: ``renumber`` numbers the kept tokens 0, 1, ... (published); ``keep`` keeps their positions.
        variant: ``published`` computes what the published code does (dvlab-research/VisionZip at 3151f6d): each tile
            keeps its share of tokens, of which the class token is one; every n-th remaining token is a target, to which
            the mean of the tokens that join it is added, before the projector; keys are averaged over heads.
    """

    keep: Share = 192 / 576
    contextual: Annotated[float, Field(ge=0, le=1)] = 10 / 64
    layer: int = -1
    variant: Variant = "default"

    name = "visionzip"
    paper = "VisionZip: Longer is Better but Not Necessary in Vision Language Models (arXiv 2412.04467)"
    trains = "yes; gradients reach merged tokens too"
    before: ClassVar[Mapping[str, Any]] = {"variant": "default"}

    @property
    def needs(self) -> Needs:
        published = self.variant == "published"
        return Needs(
            positions=self.positions,
            encoder_layers=(self.layer,),
            encoder_features=published,
            merges_features=published,
            class_features=published,
        )

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        return (AtLeastOne(0, self.keep) if self.variant == "default" else OfEachTile(0, self.keep),)

    def choose(self, candidates: Candidates) -> Selection:
        if self.variant == "published":
            return self._choose_published(candidates)
        boundary, signals = candidates.boundary, signals_of(candidates, 1)
        sizes = sizes_before(boundary)
        scores = neutral(signals.attention[0], boundary).split(sizes)
        empty = boundary.span_of_visual[:0]
        chosen, at, values, first, place = [empty], [empty], [candidates.hidden[:0]], 0, 0
        hidden, keys = candidates.hidden.split(sizes), signals.keys.split(sizes)
        patch = (~signals.attention[0].isnan()).split(sizes)
        for number, span in enumerate(boundary.spans):
            targets = self.targets(span.before, span.after)
            dominant, contextual, means = zipped(
                hidden[number], scores[number], keys[number], patch[number], span.after, targets
            )
            chosen.append(first + torch.cat([dominant, contextual]))
            at.append(torch.arange(place + len(dominant), place + span.after, device=empty.device))
            values.append(means)
            first, place = first + span.before, place + span.after
        return Selection(torch.cat(chosen), torch.cat(at), torch.cat(values))

    def _choose_published(self, candidates: Candidates) -> Selection:
        boundary, signals = candidates.boundary, signals_of(candidates, 1)
        assert signals.features is not None, "the tower's features are among the needs"
        order = by_tile(signals.tile, boundary)
        kept = [_Kept(boundary.span_of_visual[:0], signals.features[:0], boundary.span_of_visual[:0].bool())]
        images = parts_of(boundary)
        places = iter(order.split([size for parts in images for size, _ in parts]))
        for parts in images:
            kept += _in_published_order([self._tile(signals, next(places), count) for _, count in parts])
        chosen, features, merges = (torch.cat(parts) for parts in zip(*kept, strict=True))
        values = projected(candidates, signals, features, merges, chosen)
        return Selection(chosen, torch.arange(len(chosen), device=chosen.device), values)

    def _tile(self, signals: EncoderSignals, tokens_n: Tensor, count: int) -> tuple[_Kept, _Kept, _Kept]:
        """The class token, the dominant and the contextual tokens of one tile, ``count`` in all."""
        assert signals.features is not None
        targets = self.targets(len(tokens_n), count)
        with_class = signals.class_features is not None and count < len(tokens_n) and count - targets > 1
        first_n = tokens_n[: int(with_class)]
        class_features = (signals.features if signals.class_features is None else signals.class_features)[first_n]
        scores_n = signals.attention[0].index_select(0, tokens_n)
        features_nM, keys = signals.features.index_select(0, tokens_n), signals.keys.index_select(0, tokens_n)
        mean_keys = keys.unflatten(-1, (signals.heads, -1)).float().mean(dim=1)
        dominant, contextual, sums = zipped_as_published(
            features_nM, scores_n, mean_keys, count - targets - int(with_class), targets
        )
        patch = ~scores_n.isnan()
        return (
            _Kept(first_n, class_features, torch.ones_like(first_n, dtype=torch.bool)),
            _Kept(tokens_n[dominant], features_nM[dominant], torch.zeros_like(dominant, dtype=torch.bool)),
            _Kept(tokens_n[contextual], sums, patch[contextual]),
        )

    def targets(self, before: int, after: int) -> int:
        """Number of contextual tokens of an image; 0 if all tokens are kept."""
        return 0 if before == after else floor_of(self.contextual, after)

    def selector_flops(self, hidden: int, boundary: Boundary) -> float:
        pairs = sum(self.targets(span.before, span.after) * (span.before - span.after) for span in boundary.spans)
        flops = 4.0 * hidden * pairs  # similarities and means; assumes that keys have the decoder's hidden size
        if self.variant == "default":
            return flops
        return flops + sum(4.0 * hidden**2 * span.after for span in boundary.spans)  # and the projector


def zipped(
    hidden_nC: Tensor, scores_n: Tensor, keys: Tensor, patch_n: Tensor, count: int, targets: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce one image's tokens.

    Args:
        hidden_nC: hidden states of the image's tokens.
        scores_n: float32; ties go to the earlier token.
        keys: [n, M], features compared by cosine similarity.
        patch_n: bool mask of patch tokens; other tokens are never merged.
        count: number of output tokens.
        targets: number of contextual tokens among them.

    Returns:
        [count - targets] int64 ascending, the dominant tokens; [targets] int64 ascending, evenly spaced remaining
        tokens that serve as merge targets; [targets, C] their merged values.
    """
    order = torch.sort(scores_n, descending=True, stable=True).indices
    dominant = torch.sort(order[: count - targets]).values
    rest = torch.sort(order[count - targets :]).values
    places = spread(targets, len(rest))
    among = to_device((places, np.setdiff1d(np.arange(len(rest)), places)), rest.device)
    contextual, others = (rest.index_select(0, index) for index in among)
    if not targets:
        return dominant, contextual, hidden_nC[:0]
    unit = normalize(keys.float(), dim=-1)
    joined, joins = patch_n.index_select(0, contextual), patch_n.index_select(0, others)
    likeness = unit.index_select(0, others) @ unit.index_select(0, contextual).T
    target = likeness.masked_fill(~joined, -2.0).argmax(dim=1)
    weights = torch.ones(targets, device=rest.device), (joins & joined.any()).float()
    return dominant, contextual, merged(hidden_nC, contextual, others, target, weights)


class _Kept(NamedTuple):
    """Tokens of the next stage: the candidates whose places they take [k], their features before the projector [k, M],
    and whether these replace the candidates' hidden states [k]."""

    chosen: Tensor
    features: Tensor
    merges: Tensor


def _in_published_order(tiles: list[tuple[_Kept, _Kept, _Kept]]) -> list[_Kept]:
    """All tokens of the first tile; the dominant tokens of the others, row by row of their common grid; their class
    tokens; and their contextual tokens."""
    if len(tiles) < 2:
        return [part for tile in tiles for part in tile]
    classes, dominant, contextual = (
        _Kept(*(torch.cat(parts) for parts in zip(*kind, strict=True))) for kind in zip(*tiles[1:], strict=True)
    )
    order = torch.sort(dominant.chosen, stable=True).indices
    return [*tiles[0], _Kept(*(part.index_select(0, order) for part in dominant)), classes, contextual]


def zipped_as_published(
    features_nM: Tensor, scores_n: Tensor, keys: Tensor, dominant: int, targets: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce one tile's tokens as the published code does.

    Args:
        features_nM: the tower's features.
        scores_n: float32, NaN for tokens that are not patches, which come last and are not merged.
        keys: [n, D], compared by cosine similarity.
        dominant: number of tokens to keep by score.
        targets: number of contextual tokens, at most n - dominant.

    Returns:
        [dominant] int64 ascending, the dominant tokens; [targets] int64 ascending, the first and every n-th of the
        remaining tokens; [targets, M] each of these plus the mean of the tokens that join it.
    """
    order = torch.sort(scores_n.nan_to_num(-1.0), descending=True, stable=True).indices
    best, rest = torch.sort(order[:dominant]).values, torch.sort(order[dominant:]).values
    if not targets:
        return best, rest[:0], features_nM[:0]
    places = np.arange(targets) * (len(rest) // targets)
    among = to_device((places, np.setdiff1d(np.arange(len(rest)), places)), rest.device)
    contextual, others = (rest.index_select(0, index) for index in among)
    unit = normalize(keys.float(), dim=-1)
    target = (unit.index_select(0, others) @ unit.index_select(0, contextual).T).argmax(dim=1)
    joins = ~scores_n.isnan().index_select(0, others)
    numbers = torch.arange(targets, device=rest.device)
    wide_nM = features_nM.to(torch.promote_types(features_nM.dtype, torch.float32))
    members = ((target == numbers[:, None]) & joins).to(wide_nM.dtype)  # [targets, others]
    means = members @ wide_nM.index_select(0, others) / members.sum(dim=1, keepdim=True).clamp(min=1)
    return best, contextual, (wide_nM.index_select(0, contextual) + means).to(features_nM.dtype)
