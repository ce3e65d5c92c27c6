"""LLaVA-PruMerge (arXiv 2403.15388): keeps tokens with outlier class-token attention and merges the other tokens into
them.

Shape suffixes: n tokens of an image, k kept tokens, C hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vtprune_train.core.rounding import as_fraction, floor_of
from vtprune_train.core.stream import Boundary, Drop, to_device
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.needs import Needs, Positions
from vtprune_train.pruning.ops.grids import spread
from vtprune_train.pruning.ops.significance import merged, signals_of, sizes_before
from vtprune_train.pruning.schedules.budget import scaled_to_budget
from vtprune_train.pruning.schedules.stages import AtLeastOne
from vtprune_train.pruning.setting_types import Share

EXPECTED = 1 / 14  # reported mean reduction over the datasets: about 14x
FENCE = 1.5  # interquartile ranges above the third quartile


class PruMerge(PruningMethod):
    """Keep the tokens whose class-token attention is an outlier (a variable number per image), and merge every other
    patch into the kept token with the most similar key, as an attention-weighted average.

    Args:
        keep: fixed keep ratio in (0, 1] (floor, at least one token), including the spatial tokens; ``None`` keeps the
            outliers instead.
        spatial: number of additional, evenly spaced tokens per outlier (PruMerge+: 3); 0 disables them.
        layer: layer of the vision tower; -1 is the layer whose output the projector receives.
        positions: ``renumber`` numbers the kept tokens 0, 1, ... (published); ``keep`` keeps their positions.
    """

    keep: Share | None = None
    spatial: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    layer: int = -1
    positions: Positions = "renumber"

    name = "prumerge"
    paper = "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models (arXiv 2403.15388)"
    where = "before the decoder"
    trains = "yes; gradients reach merged tokens too"

    @property
    def needs(self) -> Needs:
        return Needs(positions=self.positions, encoder_layers=(self.layer,))

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        if self.keep is not None:
            return (AtLeastOne(0, self.keep),)
        return (AtLeastOne(0, min(1.0, EXPECTED * (1 + self.spatial)), adaptive=True),)

    def for_budget(self, share: float, num_layers: int) -> PruningMethod:
        return scaled_to_budget(replace(self, keep=self.keep or EXPECTED), share, num_layers)

    def choose(self, candidates: Candidates) -> Selection:
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
        return sum(4.0 * hidden * span.after * (span.before - span.after) for span in boundary.spans)


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
