"""Diverse token subset selection: pure functions without device-to-host copies.

The greedy steps run for all images in parallel, padded to the longest. Channel sums are per token, so an image's result
does not depend on the rest of the batch.

Shape suffixes: V candidates, S images, N tokens of the longest image, C channels, K tokens selected from all images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune_train.core.stream import to_device

ROWS_AT_A_TIME = 1024  # rows of an image's similarity matrix computed at once


def max_min_diverse(features_VC: Tensor, sizes: Sequence[int], take: Sequence[int]) -> Tensor:
    """Greedy max-min diversity by cosine distance: start with the token farthest from its nearest neighbour, then
    repeatedly add the token farthest from its nearest selected token. Ties go to the earlier token.

    Source: DivPrune (arXiv 2503.02175), its greedy solution of the max-min diversity problem.

    Args:
        features_VC: any float dtype, grouped by image.
        sizes: tokens of each image.
        take: number of tokens to select per image, at most its size.

    Returns:
        [K] int64 candidate indices, grouped by image and ascending within each.
    """
    unit_SNC, real_SN = _padded(F.normalize(features_VC.float(), dim=-1), sizes)
    nearest = [nearest_other(unit[:size]) for unit, size in zip(unit_SNC, sizes, strict=True)]
    distance_SN, _ = _padded(torch.cat(nearest) if nearest else features_VC.new_zeros(0), sizes)
    picks: list[Tensor] = []
    for step in range(max(take, default=0)):
        best_S = distance_SN.masked_fill(~real_SN, -torch.inf).argmax(dim=1)
        picks.append(best_S)
        real_SN = real_SN.scatter(1, best_S[:, None], False)
        to_best_SN = 1.0 - _rows_dot(unit_SNC, best_S)
        distance_SN = to_best_SN if step == 0 else torch.minimum(distance_SN, to_best_SN)
    return _in_order(picks, sizes, take, features_VC.device)


def nearest_other(unit_NC: Tensor) -> Tensor:
    """[N] float32: cosine distance of each token to its nearest neighbour; infinite for a single token."""
    parts = [unit_NC.new_zeros(0)]
    for start in range(0, len(unit_NC), ROWS_AT_A_TIME):
        distance = 1.0 - unit_NC[start : start + ROWS_AT_A_TIME] @ unit_NC.T
        distance.diagonal(start).fill_(torch.inf)
        parts.append(distance.amin(dim=1))
    return torch.cat(parts)


def determinantal(features_VC: Tensor, relevance_V: Tensor, sizes: Sequence[int], take: Sequence[int]) -> Tensor:
    """Greedy search for the subset that maximizes the determinant of ``relevance_i * cos_ij * relevance_j``: each step
    adds the token that increases the volume most. Once no token increases it (more tokens than dimensions), tokens are
    added by relevance.

    Sources: CDPruner (arXiv 2506.10967), conditional kernel and its MAP inference; the greedy steps follow Chen et al.
    2018 (arXiv 1709.05135), algorithm 1, with the rows of the Cholesky factor as projections onto orthonormal axes, so
    every step has the same cost.

    Args:
        features_VC: any float dtype, grouped by image.
        relevance_V: positive weights.
        sizes: tokens of each image.
        take: number of tokens to select per image, at most its size.

    Returns:
        [K] int64 candidate indices, grouped by image and ascending within each.
    """
    weighted = F.normalize(features_VC.double(), dim=-1) * relevance_V.double().unsqueeze(-1)
    weighted_SNC, real_SN = _padded(weighted, sizes)
    relevance_SN, _ = _padded(relevance_V.double(), sizes)
    own_SN = relevance_SN.square()
    gain_SN = own_SN.clone()
    axes_SKC = weighted_SNC.new_zeros(len(sizes), max(take, default=0), weighted_SNC.shape[-1])
    picks: list[Tensor] = []
    for step in range(axes_SKC.shape[1]):
        spent = gain_SN <= 1e-9 * own_SN
        # fallback score below every real gain (which is positive), ordered by relevance
        order_SN = torch.where(spent, relevance_SN - 1.0 - relevance_SN.amax(dim=1, keepdim=True), gain_SN)
        best_S = order_SN.masked_fill(~real_SN, -torch.inf).argmax(dim=1)
        picks.append(best_S)
        real_SN = real_SN.scatter(1, best_S[:, None], False)
        axis_S1C = _new_axis(_row_of_each(weighted_SNC, best_S), axes_SKC[:, :step])
        axes_SKC[:, step] = axis_S1C.squeeze(1).masked_fill(spent.gather(1, best_S[:, None]), 0.0)
        gain_SN = gain_SN - (weighted_SNC * axes_SKC[:, step : step + 1]).sum(dim=-1).square()
    return _in_order(picks, sizes, take, features_VC.device)


def _new_axis(vector_S1C: Tensor, axes_SKC: Tensor) -> Tensor:
    """[S, 1, C] unit vectors: the component of each vector orthogonal to its image's axes (orthonormal or zero)."""
    along_SK1 = (axes_SKC * vector_S1C).sum(dim=-1, keepdim=True)
    return F.normalize(vector_S1C - (axes_SKC * along_SK1).sum(dim=1, keepdim=True), dim=-1)


def _row_of_each(values_SNC: Tensor, best_S: Tensor) -> Tensor:
    """[S, 1, C], the row of token ``best_S`` of each image."""
    return values_SNC.gather(1, best_S[:, None, None].expand(-1, 1, values_SNC.shape[2]))


def _rows_dot(unit_SNC: Tensor, best_S: Tensor) -> Tensor:
    """[S, N] dot products of every token with its image's token ``best_S``."""
    return (unit_SNC * _row_of_each(unit_SNC, best_S)).sum(dim=-1)


def _padded(values_V: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """[S, N, ...] values per image, zero-padded at the end, and [S, N] bool mask of the entries that are not
    padding."""
    longest = max(sizes, default=0)
    columns = np.arange(longest)
    real = columns[None, :] < np.asarray(sizes, dtype=np.int64).reshape(-1, 1)
    places, mask = to_device((np.flatnonzero(real), real), values_V.device)
    padded = values_V.new_zeros((len(sizes) * longest, *values_V.shape[1:])).index_copy(0, places, values_V)
    return padded.unflatten(0, (len(sizes), longest)), mask


def _in_order(picks: list[Tensor], sizes: Sequence[int], take: Sequence[int], device: torch.device) -> Tensor:
    """Candidate indices of each image's first ``take`` picks, sorted ascending."""
    if not picks:
        return torch.zeros(0, dtype=torch.int64, device=device)
    starts = np.cumsum([0, *sizes])[:-1]
    wanted = np.arange(len(picks))[None, :] < np.asarray(take).reshape(-1, 1)  # [S, steps]
    places, shift = to_device((np.flatnonzero(wanted), starts), device)
    rows = torch.stack(picks, dim=1) + shift[:, None]
    return torch.sort(rows.flatten().index_select(0, places)).values


def marginally_relevant(
    features_VC: Tensor,
    importance_V: Tensor,
    sizes: Sequence[int],
    take: Sequence[int],
    balance: float,
    at_once: int = 1,
) -> Tensor:
    """Greedy maximal marginal relevance: start with the most important tokens, then repeatedly add those with the
    highest ``balance * importance - (1 - balance) * (largest cosine similarity to a selected token)``. Ties go to the
    earlier token.

    Source: IDPruner (arXiv 2602.13315), its re-ranking by maximal marginal relevance.

    Args:
        features_VC: any float dtype, grouped by image.
        importance_V: importance in [0, 1].
        sizes: tokens of each image.
        take: number of tokens to select per image, at most its size.
        balance: weight of the importance.
        at_once: tokens added per step.

    Returns:
        [K] int64 candidate indices, grouped by image and ascending within each.
    """
    unit_SNC, real_SN = _padded(F.normalize(features_VC.float(), dim=-1), sizes)
    importance_SN, _ = _padded(importance_V.float(), sizes)
    score_SN, nearest_SN = importance_SN, torch.full_like(importance_SN, -2.0)
    picks: list[Tensor] = []
    while len(picks) < max(take, default=0):
        ordered_SN = score_SN.masked_fill(~real_SN, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        for best_S in ordered_SN[:, :at_once].unbind(1):
            picks.append(best_S)
            real_SN = real_SN.scatter(1, best_S[:, None], False)
            nearest_SN = torch.maximum(nearest_SN, _rows_dot(unit_SNC, best_S))
        score_SN = balance * importance_SN - (1.0 - balance) * nearest_SN
    return _in_order(picks, sizes, take, features_VC.device)


def covering(features_VC: Tensor, saliency_V: Tensor, sizes: Sequence[int], take: Sequence[int]) -> Tensor:
    """Greedy coverage weighted by saliency: each step adds the token with the highest ``saliency * gain``, where the
    gain is how much it increases, summed over all tokens of the image, the cosine similarity to the nearest selected
    token (0 without one). Ties go to the earlier token.

    Source: SCOPE (arXiv 2510.24214), token-coverage gain and SCOPE score. The gains of a step are sums over all pairs
    of tokens, so images are processed one by one and do not depend on the rest of the batch.

    Args:
        features_VC: any float dtype, grouped by image.
        saliency_V: non-negative weights.
        sizes: tokens of each image.
        take: number of tokens to select per image, at most its size.

    Returns:
        [K] int64 candidate indices, grouped by image and ascending within each.
    """
    chosen, start = [torch.zeros(0, dtype=torch.int64, device=features_VC.device)], 0
    images = zip(features_VC.split(list(sizes)), saliency_V.float().split(list(sizes)), sizes, take, strict=True)
    for features_NC, saliency_N, size, count in images:
        if count == size:
            chosen.append(torch.arange(start, start + size, device=features_VC.device))
        elif count:
            chosen.append(start + _covering(F.normalize(features_NC.float(), dim=-1), saliency_N, count))
        start += size
    return torch.cat(chosen)


def _covering(unit_NC: Tensor, saliency_N: Tensor, count: int) -> Tensor:
    """[count] int64 ascending, the tokens of one image."""
    cosine_NN = unit_NC @ unit_NC.T
    covered_N1, free_N = torch.zeros_like(saliency_N)[:, None], torch.ones_like(saliency_N, dtype=torch.bool)
    picks = []
    for _ in range(count):
        gain_N = (cosine_NN - covered_N1).clamp(min=0.0).sum(dim=0) * saliency_N
        best_1 = gain_N.masked_fill(~free_N, -torch.inf).argmax(dim=0, keepdim=True)
        picks.append(best_1)
        free_N = free_N.index_fill(0, best_1, False)
        covered_N1 = torch.maximum(covered_N1, cosine_NN.index_select(1, best_1))
    return torch.sort(torch.cat(picks)).values


def without_duplicates(features_NC: Tensor, comparable_N: Tensor, count: int, at_once: int = 8) -> Tensor:
    """Repeatedly remove duplicates: divide the remaining tokens alternately into two groups and remove from the first
    group the ``at_once`` tokens (fewer in the last step) that are most similar to any token of the second. The rest of
    the first group, by descending similarity, and then the second group form the next order.

    Source: VisPruner (arXiv 2412.01818), its removal of duplicate tokens.

    Args:
        features_NC: tokens of one image in the order in which they are divided, any float dtype.
        comparable_N: bool; other tokens count as duplicates.
        count: number of tokens to keep, 1 to N.

    Returns:
        [count] int64, indices of the remaining tokens.
    """
    unit_NC = F.normalize(features_NC.float(), dim=-1)
    cosine_NN = unit_NC @ unit_NC.T
    left = torch.arange(len(unit_NC), device=unit_NC.device)
    while len(left) > count:
        first, second = left[::2], left[1::2]
        similar = cosine_NN.index_select(0, first).index_select(1, second).amax(dim=1)
        similar = similar.masked_fill(~comparable_N.index_select(0, first), 2.0)
        order = torch.sort(similar, descending=True, stable=True).indices[min(at_once, len(left) - count) :]
        left = torch.cat([first.index_select(0, order), second])
    return left
