"""VisionZip (arXiv 2412.04467): keeps dominant tokens by vision-tower attention and merges the rest into a few
contextual tokens.

Shape suffixes: n tokens of an image, C hidden size.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vtprune_train.core.rounding import floor_of
from vtprune_train.core.stream import Boundary, Drop, to_device
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.methods.one_share import OneShare
from vtprune_train.pruning.needs import Needs
from vtprune_train.pruning.ops.grids import spread
from vtprune_train.pruning.ops.significance import merged, neutral, signals_of, sizes_before
from vtprune_train.pruning.schedules.stages import AtLeastOne
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
    """

    keep: Share = 192 / 576
    contextual: Annotated[float, Field(ge=0, le=1)] = 10 / 64
    layer: int = -1

    name = "visionzip"
    paper = "VisionZip: Longer is Better but Not Necessary in Vision Language Models (arXiv 2412.04467)"
    trains = "yes; gradients reach merged tokens too"

    @property
    def needs(self) -> Needs:
        return Needs(positions=self.positions, encoder_layers=(self.layer,))

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        return (AtLeastOne(0, self.keep),)

    def choose(self, candidates: Candidates) -> Selection:
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

    def targets(self, before: int, after: int) -> int:
        """Number of contextual tokens of an image; 0 if all tokens are kept."""
        return 0 if before == after else floor_of(self.contextual, after)

    def selector_flops(self, hidden: int, boundary: Boundary) -> float:
        pairs = sum(self.targets(span.before, span.after) * (span.before - span.after) for span in boundary.spans)
        return 4.0 * hidden * pairs  # similarities and means; assumes that keys have the decoder's hidden size


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
