"""Vision-tower attention per visual token, used for scoring by methods that prune before the decoder.

Shape suffixes: V visual tokens, L layers of the tower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtprune_train.core.stream import Boundary
from vtprune_train.pruning.candidates import Candidates, EncoderSignals


def signals_of(candidates: Candidates, layers: int) -> EncoderSignals:
    """Return the vision-tower signals of the candidates; empty if the batch has no image.

    Raises:
        ValueError: no vision-tower signals were captured, e.g. because the model was called with inputs_embeds only.
    """
    if candidates.encoder is not None:
        return candidates.encoder
    if len(candidates.boundary.span_of_visual):
        raise ValueError(
            "the method reads the vision tower, but the tower did not run in this call; pass pixel_values to the model"
        )
    hidden = candidates.hidden
    return EncoderSignals(
        hidden.new_zeros((layers, 0), dtype=torch.float32),
        hidden.new_zeros((0, 1)),
        hidden.new_zeros(0).long(),
        hidden.new_zeros((0, 1)),
    )


def neutral(scores_V: Tensor, boundary: Boundary) -> Tensor:
    """[V] ``scores_V`` with NaN (non-patch tokens) replaced by the image's mean score, or 0 if all are NaN."""
    filled = [scores_V[:0]]
    for scores in scores_V.split(sizes_before(boundary)):
        filled.append(torch.where(scores.isnan(), torch.nan_to_num(scores.nanmean(), nan=0.0), scores))
    return torch.cat(filled)


def sizes_before(boundary: Boundary) -> list[int]:
    """Number of candidates of each image."""
    return [span.before for span in boundary.spans]


def ranked(scores_V: Tensor, number: Tensor) -> Tensor:
    """[V] int64: token order: sorted by ``number`` ascending, then score descending, then index."""
    order = torch.sort(scores_V, descending=True, stable=True).indices
    return order.index_select(0, torch.sort(number.index_select(0, order), stable=True).indices)


def merged(hidden: Tensor, kept: Tensor, others: Tensor, target: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """[k, C]: weighted average of each kept token and the tokens merged into it; unchanged if nothing is merged.
    Gradients flow to all of them.

    Uses a matmul with the membership matrix, in at least float32, because index_add is not deterministic on GPUs.

    Args:
        hidden: [n, C] tokens.
        kept: [k] int64, indices of kept tokens.
        others: [m] int64, indices of merged tokens.
        target: [m] int64, the index into ``kept`` that each is merged into.
        weights: non-negative float weights of ``kept`` [k] and of ``others`` [m].
    """
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    kept_hidden, merged_hidden = wide.index_select(0, kept), wide.index_select(0, others)
    numbers = torch.arange(len(kept), device=target.device)
    shares = (target == numbers[:, None]) * weights[1].to(wide.dtype)  # [k, m]
    total = weights[0].to(wide.dtype) + shares.sum(dim=1)
    # dividing by a tiny number would give infinite gradients
    shares = shares / torch.where(total > torch.finfo(wide.dtype).tiny, total, 1.0)[:, None]
    return (kept_hidden + (shares @ merged_hidden - shares.sum(dim=1, keepdim=True) * kept_hidden)).to(hidden.dtype)
