"""LLaVA-PruMerge (arXiv 2403.15388): keeps tokens with outlier class-token attention and merges the other tokens into
them.

Shape suffixes: n tokens of an image, k kept tokens, C hidden size, M input size of the projector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vtprune_train.core.rounding import as_fraction, floor_of
from vtprune_train.core.stream import Boundary, Drop, to_device
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.needs import Needs, Positions, Variant
from vtprune_train.pruning.ops.grids import spread
from vtprune_train.pruning.ops.significance import merged, projected, signals_of, sizes_before
from vtprune_train.pruning.schedules.budget import scaled_to_budget
from vtprune_train.pruning.schedules.stages import AtLeastOne
from vtprune_train.pruning.setting_types import Share

EXPECTED = 1 / 14  # reported mean reduction over the datasets: about 14x
FENCE = 1.5  # interquartile ranges above the third quartile
NEIGHBOURS = 32  # variant=published: patches added to each kept token


class WithSum(AtLeastOne):
    """Keeps one token more, for the sum of the dropped ones."""

    def kept(self, length: int, before: int) -> int:
        return min(before, max(2, super().kept(length, before) + 1))


class PruMerge(PruningMethod):
    """Keep the tokens whose class-token attention is an outlier (a variable number per image), and merge every other
    patch into the kept token with the most similar key, as an attention-weighted average.

    Args:
        keep: fixed keep ratio in (0, 1] (floor, at least one token), including the spatial tokens; ``None`` keeps the
            outliers instead.
        spatial: number of additional, evenly spaced tokens per outlier (PruMerge+: 3); 0 disables them.
        layer: layer of the vision tower; -1 is the layer whose output the projector receives, or, with ``variant:
            published``, the tower's last layer.
        positions: ``renumber`` numbers the kept tokens 0, 1, ... (published); ``keep`` keeps their positions.
        variant: ``published`` computes what the published code does (42Shawn/LLaVA-PruMerge at 097c041): attention is
            one softmax over all channels of the tower's last layer; each kept token becomes the sum of itself and its
            32 nearest patches, weighted by attention, before the projector; and one more token is the weighted sum of
            the dropped ones. Additional tokens lie on a grid over all tokens; with ``keep: 0.25`` and ``spatial: 1``,
            that is the published rule for training.
    """

    keep: Share | None = None
    spatial: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    layer: int = -1
    positions: Positions = "renumber"
    variant: Variant = "default"

    name = "prumerge"
    paper = "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models (arXiv 2403.15388)"
    where = "before the decoder"
    trains = "yes; gradients reach merged tokens too"
    before: ClassVar[Mapping[str, Any]] = {"variant": "default"}

    def __post_init__(self) -> None:
        if self.variant == "published" and self.layer < -1:
            raise ValueError(
                f"layer={self.layer} with variant=published: use -1, the tower's last layer (published), or a number "
                "from 0, counted from the first layer"
            )

    @property
    def needs(self) -> Needs:
        if self.variant == "default":
            return Needs(positions=self.positions, encoder_layers=(self.layer,))
        return Needs(
            positions=self.positions,
            encoder_layers=("last" if self.layer == -1 else self.layer,),
            encoder_heads="joined",
            encoder_features=True,
            merges_features=True,
        )

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        kind = AtLeastOne if self.variant == "default" else WithSum
        if self.keep is not None:
            return (kind(0, self.keep),)
        return (kind(0, min(1.0, EXPECTED * (1 + self.spatial)), adaptive=True),)

    def for_budget(self, share: float, num_layers: int) -> PruningMethod:
        return scaled_to_budget(replace(self, keep=self.keep or EXPECTED), share, num_layers)

    def choose(self, candidates: Candidates) -> Selection:
        if self.variant == "published":
            return self._choose_published(candidates)
        boundary, signals = candidates.boundary, signals_of(candidates, 1)
        sizes = sizes_before(boundary)
        attention, keys = signals.attention[0].split(sizes), signals.keys.split(sizes)
        if self.keep is None and sizes:
            num_outliers = torch.stack([outliers(scores) for scores in attention]).tolist()  # the only copy to the host
            counts = [self._counted(outlying, n) for outlying, n in zip(num_outliers, sizes, strict=True)]
        else:
            counts = [self._shared(span.after) for span in boundary.spans]
        empty = boundary.span_of_visual[:0]
        chosen, values, first = [empty], [candidates.hidden[:0]], 0
        for hidden, score, key, count in zip(candidates.hidden.split(sizes), attention, keys, counts, strict=True):
            kept = kept_tokens(score, *count)
            chosen.append(first + kept)
            values.append(merged_into(hidden, score, key, kept))
            first += len(hidden)
        all_kept = torch.cat(chosen)
        totals = torch.tensor([best + spatial for best, spatial in counts], dtype=torch.int64)
        at = torch.arange(len(all_kept), device=all_kept.device)
        return Selection(all_kept, at, torch.cat(values), totals if self.keep is None else None)

    def _choose_published(self, candidates: Candidates) -> Selection:
        boundary, signals = candidates.boundary, signals_of(candidates, 1)
        sizes = sizes_before(boundary)
        assert signals.features is not None, "the tower's features are among the needs"
        attention = signals.attention[0].split(sizes)
        kept = self._kept_published(attention, boundary)
        empty = boundary.span_of_visual[:0]
        chosen, merges, merged_KM, first = [empty], [empty.bool()], [signals.features[:0]], 0
        for features, scores, keys, kept_k in zip(
            signals.features.split(sizes), attention, signals.keys.split(sizes), kept, strict=True
        ):
            n = len(scores)
            if n > 1:
                last = kept_k.new_full((1,), n - 1)  # the place of the sum
                chosen.append(first + torch.cat([kept_k, last]))
                merges.append(torch.cat([~scores.index_select(0, kept_k).isnan(), last > 0]))
                merged_KM.append(summed(features, scores, keys, kept_k))
            else:
                chosen.append(torch.arange(first, first + n, device=empty.device))
                merges.append(torch.zeros(n, dtype=torch.bool, device=empty.device))
                merged_KM.append(features)
            first += n
        counts = torch.tensor([len(image) for image in chosen[1:]], dtype=torch.int64)
        all_kept = torch.cat(chosen)
        values = projected(candidates, signals, torch.cat(merged_KM), torch.cat(merges), all_kept)
        at = torch.arange(len(all_kept), device=all_kept.device)
        return Selection(all_kept, at, values, counts if self.keep is None else None)

    def _kept_published(self, attention: Sequence[Tensor], boundary: Boundary) -> Sequence[Tensor]:
        """[k] int64 for each image, at least one token fewer than the image has: the tokens with the most attention,
        best first, then those on a grid."""
        orders = [torch.sort(scores.nan_to_num(-1.0), descending=True, stable=True).indices for scores in attention]
        device = boundary.span_of_visual.device
        if self.keep is not None:
            counts = [self._shared(max(span.after - 1, 0)) for span in boundary.spans]
            grids = to_device(tuple(_grid(n, g) for (_, g), n in zip(counts, map(len, orders), strict=True)), device)
            return [torch.cat([o[:best], grid]) for o, (best, _), grid in zip(orders, counts, grids, strict=True)]
        if not orders:
            return []
        ends = np.cumsum([len(orders), *map(len, orders)])[:-1]
        num_outliers = torch.stack([outliers(scores) for scores in attention])
        outlying, *on_host = np.split(torch.cat([num_outliers, *orders]).cpu().numpy(), ends)  # the only copy to it
        kept = (_with_grid(order, number, self.spatial) for order, number in zip(on_host, outlying, strict=True))
        return to_device(tuple(kept), device)  # type: ignore[no-any-return]

    def _counted(self, outlying: int, tokens: int) -> tuple[int, int]:
        """Return the number of tokens kept by attention and the number of evenly spaced ones."""
        best = min(max(1, outlying), tokens)
        return best, min(tokens - best, floor_of(self.spatial, best))

    def _shared(self, count: int) -> tuple[int, int]:
        """Like :meth:`_counted`, but the two numbers add up to ``count``."""
        best = min(count, max(1, round(count / (1 + as_fraction(self.spatial)))))  # round half to even
        return best, count - best

    def selector_flops(self, hidden: int, boundary: Boundary) -> float:
        # similarities and means; assumes keys have the decoder's hidden size
        if self.variant == "default":
            return sum(4.0 * hidden * span.after * (span.before - span.after) for span in boundary.spans)
        return sum(4.0 * hidden * span.after * (span.before + hidden) for span in boundary.spans)  # and the projector


def outliers(attention_n: Tensor) -> Tensor:
    """[] int64: tokens above the third quartile by more than :data:`FENCE` interquartile ranges. NaN values (non-patch
    tokens) are ignored; quartiles use linear interpolation, as in numpy."""
    if not len(attention_n):
        return torch.zeros((), dtype=torch.int64, device=attention_n.device)
    first, third = (torch.nanquantile(attention_n, quartile) for quartile in (0.25, 0.75))
    return (attention_n > third + FENCE * (third - first)).sum()


def kept_tokens(attention_n: Tensor, best: int, spatial: int) -> Tensor:
    """[best + spatial] int64 ascending: the ``best`` tokens with the highest attention (ties go to the earlier token;
    non-patch tokens rank last), plus ``spatial`` evenly spaced ones from the rest."""
    order = torch.sort(attention_n.nan_to_num(-1.0), descending=True, stable=True).indices
    others = torch.sort(order[best:]).values
    places = to_device(spread(spatial, len(others)), order.device)
    return torch.sort(torch.cat([order[:best], others.index_select(0, places)])).values


def merged_into(hidden_nC: Tensor, attention_n: Tensor, keys: Tensor, kept_k: Tensor) -> Tensor:
    """[k, C]: each kept token averaged with the patches assigned to it.

    Non-patch tokens are never merged and never receive merges: their weight is 0 and their key is zero.
    """
    n, k = len(hidden_nC), len(kept_k)
    if not k:  # an earlier method dropped all of this image's tokens
        return hidden_nC
    is_kept = torch.zeros(n, dtype=torch.bool, device=kept_k.device).index_fill(0, kept_k, True)
    others = torch.sort(is_kept.long(), stable=True).indices[: n - k]
    unit = normalize(keys.float(), dim=-1)
    no_patch = attention_n.isnan()
    likeness = unit.index_select(0, others) @ unit.index_select(0, kept_k).T  # [n - k, k]
    likeness = likeness.masked_fill(no_patch.index_select(0, kept_k), -2.0)
    weight = attention_n.nan_to_num(0.0)
    weights = weight.index_select(0, kept_k), weight.index_select(0, others)
    return merged(hidden_nC, kept_k, others, likeness.argmax(dim=1), weights)


def _grid(n: int, count: int) -> np.ndarray:
    """[count] int64 ascending: the middles of ``n // count`` tokens each: 4, 12, ..., 572 for 72 of 576."""
    step = n // max(count, 1)
    return np.arange(count, dtype=np.int64) * step + step // 2


def _with_grid(order_n: np.ndarray, outlying: int, spatial: float) -> np.ndarray:
    """[k] int64, fewer than n: the first ``outlying`` tokens of ``order_n`` (at least one), and the tokens of a grid
    with ``spatial`` tokens for each of them that are not among them."""
    n = len(order_n)
    best = order_n[: min(max(1, int(outlying)), max(n - 1, 0))]
    if not spatial or not len(best):
        return best
    step = int(1 / (len(best) / n))  # as in the published code, also in its rounding
    grid = np.arange(0, n - 1, max(1, int(step / spatial)), dtype=np.int64)
    return np.concatenate([best, grid[~np.isin(grid, best)][: n - 1 - len(best)]])


def summed(features_nM: Tensor, attention_n: Tensor, keys: Tensor, kept_k: Tensor) -> Tensor:
    """[k + 1, M]: each kept token plus the sum of its :data:`NEIGHBOURS` patches with the most similar keys, weighted
    by attention; and the weighted sum of the tokens that are not kept. With gradients for ``features_nM``.

    Neighbours are other kept tokens too. Tokens that are not patches weigh nothing. ``kept_k`` may list a token twice:
    then each is a neighbour of the other, and as many of the first tokens that are not kept are left out of all sums,
    as in the published code, so that the number of tokens does not depend on their content.
    """
    n, k = len(features_nM), len(kept_k)
    wide_nM = features_nM.to(torch.promote_types(features_nM.dtype, torch.float32))
    numbers = torch.arange(n, device=kept_k.device)
    others = torch.sort(numbers.index_fill(0, kept_k, 0)).values[k:]
    rows = torch.cat([kept_k, others])  # [n]
    unit = normalize(keys.float(), dim=-1)
    no_patch, weight = attention_n.isnan(), attention_n.nan_to_num(0.0).to(wide_nM.dtype)
    likeness = unit.index_select(0, kept_k) @ unit.index_select(0, rows).T  # [k, n]
    itself = numbers[:k, None] == numbers
    likeness = likeness.masked_fill(itself | no_patch.index_select(0, rows), -torch.inf)
    nearest = likeness.topk(min(NEIGHBOURS, n - 1), dim=1)
    weights = weight.index_select(0, rows)[nearest.indices].masked_fill(nearest.values == -torch.inf, 0.0)
    shares = weights.new_zeros(k, n).scatter(1, nearest.indices, weights)
    sums_kM = wide_nM.index_select(0, kept_k) + shares @ wide_nM.index_select(0, rows)
    rest_1M = weight.index_select(0, others)[None] @ wide_nM.index_select(0, others)
    return torch.cat([sums_kM, rest_1M]).to(features_nM.dtype)
