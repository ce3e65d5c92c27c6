"""Token recycling: the best dropped tokens are clustered with density peaks and merged into a few new tokens.

Pure functions without randomness. Source: SparseVLM (arXiv 2410.04417), section 3.4, and its code, which breaks ties
with random noise; here the earlier token wins.

Shape suffixes: N tokens to cluster, M clusters, C hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtprune_train.core.rounding import as_fraction, floor_of
from vtprune_train.core.stream import Drop
from vtprune_train.pruning.candidates import Selection

Recycle = Literal["mean", "sum", "none"]


def recycled(deleted: int) -> tuple[int, int]:
    """Given n = ``deleted`` dropped tokens, return how many of them are clustered (int(0.3 n) + 1) and the number of
    clusters (a tenth of that, plus 1)."""
    if not deleted:
        return 0, 0
    tokens = deleted * 3 // 10 + 1
    return tokens, tokens // 10 + 1


@dataclass(frozen=True)
class SparseDrop(Drop):
    """A drop that keeps ``floor(keep * original)`` tokens unchanged, or with ``of_present`` that share of the n tokens
    still present (it drops ``floor((1 - of_present) * n)``), and if ``recycles`` adds clusters of the dropped
    tokens."""

    of_present: float | None = None
    recycles: bool = True

    def left(self, length: int, before: int) -> int:
        """Number of tokens of a span kept unchanged; arguments as in :meth:`kept`."""
        if self.of_present is not None:
            return before - floor_of(1 - as_fraction(self.of_present), before)
        return min(floor_of(self.keep, length), before)

    def kept(self, length: int, before: int) -> int:
        left = self.left(length, before)
        return left + recycled(before - left)[1] * self.recycles


@torch.no_grad()
def density_peaks(features_NC: Tensor, num_clusters: int, neighbours: int | None = None) -> tuple[Tensor, Tensor]:
    """Density-peak clustering: cluster centres have high density and are far from denser tokens.

    With distances d = L2 / sqrt(C): density rho = exp(-mean of d^2 to the ``neighbours`` nearest, itself included);
    gap = d to the nearest denser token, the largest d of all for the densest; centres have the largest rho * gap; every
    other token joins the nearest centre. Ties go to the earlier token.

    Args:
        features_NC: any float dtype; computed in float32 at least.
        num_clusters: M, from 1 to N.
        neighbours: from 1 to N; ``None`` means ``num_clusters``.

    Returns:
        [M] int64, the centres, best first, and [N] int64, the cluster of each token.
    """
    features = features_NC.to(torch.promote_types(features_NC.dtype, torch.float32))
    # Compute distances directly: the matmul shortcut loses the precision needed to separate close tokens.
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    distances = distances / features.shape[1] ** 0.5  # [N, N]
    density = torch.exp(-distances.topk(neighbours or num_clusters, largest=False).values.square().mean(dim=1))
    order = torch.arange(len(density), device=density.device)
    denser = (density > density[:, None]) | ((density == density[:, None]) & (order < order[:, None]))
    gap = torch.where(denser, distances, distances.max()).amin(dim=1)
    centres = torch.sort(density * gap, descending=True, stable=True).indices[:num_clusters]
    cluster = distances.index_select(0, centres).argmin(dim=0)
    return centres, cluster.index_copy(0, centres, order[:num_clusters])


def merge_clusters(hidden_NC: Tensor, cluster_N: Tensor, num_clusters: int, average: bool) -> Tensor:
    """[M, C]: the mean (or sum) of every cluster's tokens, with gradients to all of them.

    Uses a matmul with the membership matrix, in at least float32, because index_add is not deterministic on GPUs.
    """
    dtype = torch.promote_types(hidden_NC.dtype, torch.float32)
    numbers = torch.arange(num_clusters, device=cluster_N.device)
    members = (cluster_N == numbers[:, None]).to(dtype)  # [M, N]
    if average:
        members = members / members.sum(dim=1, keepdim=True)
    return (members @ hidden_NC.to(dtype)).to(hidden_NC.dtype)


def keep_and_recycle(
    hidden_VC: Tensor, scores: Sequence[Tensor], left: Sequence[int], recycle: Recycle, counted: bool
) -> Selection:
    """Keep the best tokens of every image in their original order and append the recycled tokens after them.

    Args:
        hidden_VC: candidates grouped by image; gradients flow to both kept and recycled tokens.
        scores: for each image, [v] float32; ties go to the earlier token.
        left: number of tokens of each image kept unchanged.
        recycle: how to merge a cluster, ``mean`` or ``sum``; ``none`` disables recycling.
        counted: also return the resulting number of tokens per image.
    """
    device = hidden_VC.device
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    chosen, at, values, counts, first, place = [empty], [empty], [], [], 0, 0
    for score, stay in zip(scores, left, strict=True):
        tokens, clusters = (0, 0) if recycle == "none" else recycled(len(score) - stay)
        best = first + torch.sort(score, descending=True, stable=True).indices
        chosen.append(torch.sort(best[:stay]).values)
        if clusters:
            pool = torch.sort(best[stay : stay + tokens]).values
            features = hidden_VC.index_select(0, pool)
            centres, cluster = density_peaks(features.detach(), clusters)
            chosen.append(pool.index_select(0, centres))
            values.append(merge_clusters(features, cluster, clusters, average=recycle == "mean"))
            at.append(torch.arange(place + stay, place + stay + clusters, device=device))
        counts.append(stay + clusters)
        first, place = first + len(score), place + stay + clusters
    return Selection(
        torch.cat(chosen),
        torch.cat(at) if values else None,
        torch.cat(values) if values else None,
        torch.tensor(counts, dtype=torch.int64) if counted else None,
    )
