"""Differentiable top-k: keep probabilities in (0, 1) that sum to k.

Shape suffixes: S spans, N tokens of the longest span.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 40  # bisections: more than float32 can resolve
TAIL = 10.0  # sigmoid(-10) is close enough to 0


def soft_top_k(scores_SN: Tensor, present_SN: Tensor, take_S1: Tensor, temperature: float = 1.0) -> Tensor:
    """[S, N] float32 keep probabilities ``sigmoid(score / temperature + t)`` of each span's tokens, where ``t`` of each
    span makes them sum to its number of kept tokens. In the backward pass ``t`` follows the scores, so that the sum
    stays: raising one score lowers the other probabilities.

    Source: the published code of VisionSelector (arXiv 2510.16598), ``TopK``, which uses temperature 1.

    Args:
        scores_SN: [S, N] float32, with gradients; N is at least 1.
        present_SN: [S, N] bool, false for padding, whose probability is 0.
        take_S1: [S, 1] float32, number of kept tokens of each span. Where it is 0 or all of them, the probabilities
            are 0 or 1 and have no gradient.
        temperature: smaller values give probabilities closer to 0 and 1.
    """
    scores_SN = scores_SN / temperature
    with torch.no_grad():
        fixed = scores_SN.detach()
        low = -fixed.masked_fill(~present_SN, float("-inf")).amax(dim=1, keepdim=True) - TAIL
        high = -fixed.masked_fill(~present_SN, float("inf")).amin(dim=1, keepdim=True) + TAIL
        for _ in range(STEPS):
            middle = (low + high) / 2
            too_few = (torch.sigmoid(fixed + middle) * present_SN).sum(dim=1, keepdim=True) < take_S1
            low, high = torch.where(too_few, middle, low), torch.where(too_few, high, middle)
        shift = (low + high) / 2
        chance = torch.sigmoid(fixed + shift)
        slope = chance * (1 - chance) * present_SN
        slope = slope / slope.sum(dim=1, keepdim=True).clamp(min=torch.finfo(slope.dtype).tiny)
        divisible = (take_S1 > 0) & (take_S1 < present_SN.sum(dim=1, keepdim=True))
    following = -(slope * scores_SN).sum(dim=1, keepdim=True)  # has the gradient of t, but another value
    chance = torch.sigmoid(scores_SN + shift + (following - following.detach()))
    return torch.where(present_SN & divisible, chance, (present_SN & (take_S1 > 0)).to(chance.dtype))
