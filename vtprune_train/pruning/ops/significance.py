"""How much attention the vision tower pays to each visual token: what methods before the decoder score by.

Shape suffixes: V visual tokens, L layers of the tower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtprune_train.core.stream import Boundary
from vtprune_train.pruning.candidates import Candidates, EncoderSignals


def signals_of(candidates: Candidates, layers: int) -> EncoderSignals:
    """What the vision tower thought of the candidates; nothing where a stream has no image.

    Raises:
        ValueError: the tower was not read, as where the decoder is called with embeddings alone.
    """
    if candidates.encoder is not None:
        return candidates.encoder
    if len(candidates.boundary.span_of_visual):
        raise ValueError(
            "the method reads the vision tower's attention, which this call did not run; pass pixel_values to the model"
        )
    hidden = candidates.hidden
    return EncoderSignals(
        hidden.new_zeros((layers, 0), dtype=torch.float32), hidden.new_zeros((0, 1)), hidden.new_zeros(0).long()
    )


def neutral(scores_V: Tensor, boundary: Boundary) -> Tensor:
    """[V] ``scores_V`` with the mean of its image in place of NaN (tokens that are no patch), 0 where all are."""
    filled = [scores_V[:0]]
    for own in scores_V.split(sizes_before(boundary)):
        filled.append(torch.where(own.isnan(), torch.nan_to_num(own.nanmean(), nan=0.0), own))
    return torch.cat(filled)


def sizes_before(boundary: Boundary) -> list[int]:
    """Candidates of each image."""
    return [span.before for span in boundary.spans]


def ranked(scores_V: Tensor, number: Tensor) -> Tensor:
    """[V] int64: the tokens by ascending ``number``, equal ones by descending score, equal again by index."""
    order = torch.sort(scores_V, descending=True, stable=True).indices
    return order.index_select(0, torch.sort(number.index_select(0, order), stable=True).indices)


def merged(hidden: Tensor, kept: Tensor, others: Tensor, target: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """[k, C]: each kept token and those that join it, averaged by weight; exactly itself where none joins. Gradients
    reach all of them.

    A product with the membership matrix, in float32 at least: adding rows by index has no fixed order on a GPU.

    Args:
        hidden: [n, C] tokens.
        kept: [k] int64, which stay.
        others: [m] int64, which join.
        target: [m] int64, the place among ``kept`` that each joins.
        weights: of ``kept`` [k] and of ``others`` [m], float, not negative.
    """
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    own, joining = wide.index_select(0, kept), wide.index_select(0, others)
    numbers = torch.arange(len(kept), device=target.device)
    shares = (target == numbers[:, None]) * weights[1].to(wide.dtype)  # [k, m]
    total = weights[0].to(wide.dtype) + shares.sum(dim=1)
    # a division by next to nothing would send infinite gradients back
    shares = shares / torch.where(total > torch.finfo(wide.dtype).tiny, total, 1.0)[:, None]
    return (own + (shares @ joining - shares.sum(dim=1, keepdim=True) * own)).to(hidden.dtype)
