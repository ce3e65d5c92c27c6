"""The baseline ``pool``: the grid of tokens, downsampled by averaging blocks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vtprune_train.core.stream import Boundary, to_device
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.methods.one_share import Baseline
from vtprune_train.pruning.ops.grids import grids_of, image_blocks
from vtprune_train.pruning.ops.selection import picked_on_host


def block_means(hidden_VC: Tensor, members_M: Tensor, sizes_K: Tensor) -> Tensor:
    """[K, C] in the dtype of ``hidden_VC``, accumulated in at least float32, with a summation order independent of the
    batch.

    Args:
        hidden_VC: tokens.
        members_M: [M] int64, token indices, block by block.
        sizes_K: [K] int64, tokens of each block, at least one.
    """
    wide = hidden_VC.to(torch.promote_types(hidden_VC.dtype, torch.float32)).index_select(0, members_M)
    # unsafe: do not wait for the device to check the sizes
    return torch.segment_reduce(wide, "mean", lengths=sizes_K, axis=0, unsafe=True).to(hidden_VC.dtype)


class Pool(Baseline):
    """Average-pool each image to floor(keep * n) tokens over near-square blocks; each pooled token takes the position
    of its block's centre token.

    Args:
        keep: ratio of output to input tokens, in (0, 1].
        layer: decoder layer before which tokens are averaged; 0: before the decoder.
        positions: ``keep`` gives each pooled token the position of its block's centre token; ``renumber`` numbers them
            0, 1, ...
    """

    name = "pool"
    trains = "yes; gradients reach all tokens of a block"

    def choose(self, candidates: Candidates) -> Selection:
        boundary = candidates.boundary
        chosen = picked_on_host(boundary, lambda span: image_blocks(grids_of(span), span.after)[1])
        if all(span.after == span.before for span in boundary.spans):
            return Selection(chosen)  # one block per token
        members, sizes = to_device(_blocks(boundary), chosen.device)
        at = torch.arange(len(chosen), device=chosen.device)
        return Selection(chosen, at, block_means(candidates.hidden, members, sizes))

    def selector_flops(self, hidden: int, boundary: Boundary) -> float:
        return float(hidden * sum(span.before for span in boundary.spans))


def _blocks(boundary: Boundary) -> tuple[np.ndarray, np.ndarray]:
    """Candidate indices, block by block over all images, and the number of tokens of each block."""
    members, sizes, start = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)], 0
    for span in boundary.spans:
        block = image_blocks(grids_of(span), span.after)[0]
        pooled = np.flatnonzero(block >= 0)
        members.append(start + pooled[np.argsort(block[pooled], kind="stable")])
        sizes.append(np.bincount(block[pooled], minlength=span.after))
        start += span.before
    return np.concatenate(members), np.concatenate(sizes)
