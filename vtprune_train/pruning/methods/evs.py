"""Efficient Video Sampling (EVS, arXiv 2510.14624): keeps the visual tokens of a video that change most from frame to
frame.

Source: ``compute_retention_mask`` in ``vllm/multimodal/video_prune/evs.py`` of vllm-project/vllm at d750efb.

Shape suffixes: V candidates, F steps in time, N tokens of a step, C hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vtprune_train.core.rounding import as_fraction
from vtprune_train.core.stream import Boundary, Drop
from vtprune_train.pruning.candidates import Candidates
from vtprune_train.pruning.methods.one_share import OneShare
from vtprune_train.pruning.needs import Positions
from vtprune_train.pruning.ops.videos import Steps, VideoDrop, check_per_video, video_tokens, with_steps
from vtprune_train.pruning.setting_types import Share

ALWAYS = 255.0  # above every dissimilarity, which is at most 2


class EVS(OneShare):
    """Each video keeps its first frame, and from the other frames the tokens that differ most from the token at the
    same location in the previous frame. These are the tokens that vLLM keeps with ``--video-pruning-rate`` 1 -
    ``keep``. Images are kept whole.

    Args:
        keep: keep ratio of a video, in (0, 1]; published models use 0.3.
        positions: ``keep`` keeps the positions of the kept tokens (published); ``renumber`` numbers them 0, 1, ...
    """

    keep: Share = 0.3
    positions: Positions = "keep"

    name = "evs"
    paper = "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference (arXiv 2510.14624)"

    def __post_init__(self) -> None:
        check_per_video(self.name, self.per)

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        return (_EVSDrop(0, self.keep),)

    def score(self, candidates: Candidates) -> Tensor:
        hidden = candidates.hidden.detach()
        scores = hidden.new_full((len(hidden),), ALWAYS, dtype=torch.float32)
        for _, first, steps in with_steps(candidates.boundary.spans):
            if steps is not None:
                after_first_frame = slice(first + steps.size, first + steps.tokens)
                scores[after_first_frame] = changes(steps.of(hidden[first:])).flatten()
        return scores

    def selector_flops(self, hidden: int, boundary: Boundary) -> float:
        return 6.0 * hidden * video_tokens(boundary.spans)


class _EVSDrop(VideoDrop):
    """Counts as vLLM does: in floating point, and at least the tokens of one frame."""

    def of_steps(self, steps: Steps) -> int:
        rate = float(1 - as_fraction(self.keep))
        return max(steps.size, int(steps.tokens * (1 - rate)))


def changes(frames_FNC: Tensor) -> Tensor:
    """[F - 1, N] float32: cosine distance of each token to the token at the same location in the previous frame, in
    the precision of the features. vLLM does the same, so both have the same ties."""
    return (1 - cosine_similarity(frames_FNC[1:], frames_FNC[:-1], dim=-1)).float()
