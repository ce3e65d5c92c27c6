"""VidCom2 (arXiv 2505.14454): frames that differ more from the rest of the video keep more visual tokens, and each
frame keeps the tokens that differ most from the video and from the frame.

Sources: ``vidcom2_compression`` in ``token_compressor/vidcom2/vidcom2.py`` of xuyang-liu16/VidCom2 at 944a17d; for the
exact total, ``compute_retention_mask`` in ``vllm/multimodal/video_prune/vidcom2.py`` of vllm-project/vllm at 0f17ee0.

Shape suffixes: F steps in time, N tokens of a step, C hidden size, D channels compared.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune_train.core.stream import Boundary, Drop
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.methods.one_share import OneShare
from vtprune_train.pruning.ops.videos import Steps, VideoDrop, picked_per_video, video_tokens
from vtprune_train.pruning.setting_types import Share

WIDTHS = tuple(2.0**power for power in range(-3, 2))  # of the Gaussian kernels
TEMPERATURE = 0.01  # of the softmax over frames


class VidCom2(OneShare):
    """Each video keeps ``floor(keep * n)`` tokens, at least one per frame. A frame's share grows with its mean distance
    from the mean token of the video. In each frame, the tokens farthest from the mean tokens of the video and of the
    frame are kept. Images are kept whole.

    Args:
        keep: keep ratio of a video, in (0, 1]; the published default is 0.25.
        positions: ``renumber`` numbers the kept tokens 0, 1, ... (published for LLaVA-OneVision); ``keep`` keeps their
            positions, as always in Qwen-VL models.
    """

    keep: Share = 0.25

    name = "vidcom2"
    paper = (
        "Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models "
        "(arXiv 2505.14454)"
    )

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        return (_OnePerFrame(0, self.keep),)

    @torch.no_grad()
    def choose(self, candidates: Candidates) -> Selection:
        def pick(frames_FNC: Tensor, count: int) -> Tensor:
            return most_distinct(frames_FNC, self.keep, count)

        return Selection(picked_per_video(candidates.hidden.detach(), candidates.boundary, pick))

    def selector_flops(self, hidden: int, boundary: Boundary) -> float:
        return 8.0 * hidden * video_tokens(boundary.spans)  # variances; norms and distances over half of the channels


class _OnePerFrame(VideoDrop):
    def of_steps(self, steps: Steps) -> int:
        return max(steps.count, super().of_steps(steps))


def most_distinct(frames_FNC: Tensor, share: float, count: int) -> Tensor:
    """[count] int64 indices into F * N: first the most distinct token of each frame, then the other tokens that their
    frames' budgets keep, then the rest; each most distinct first. Ties go to the earlier token.

    Args:
        frames_FNC: a video's tokens, any float dtype; computed in float32 at least.
        share: mean of the frames' budgets, as a share of their tokens.
        count: number of tokens to keep, at least F and close to the sum of the budgets.
    """
    of_video_FN, of_frame_FN = similarities(frames_FNC)
    similarity_FN = of_video_FN + of_frame_FN
    budget_F = budgets(of_video_FN, share)
    place_FN = similarity_FN.sort(dim=1, stable=True).indices.argsort(dim=1)  # 0 for a frame's most distinct token
    group_n = ((place_FN > 0).to(torch.uint8) + (place_FN >= budget_F[:, None])).flatten()
    order_n = similarity_FN.flatten().sort(stable=True).indices
    by_group_n = group_n.index_select(0, order_n).sort(stable=True).indices
    return order_n.index_select(0, by_group_n[:count])


def similarities(frames_FNC: Tensor) -> tuple[Tensor, Tensor]:
    """[F, N] similarity of each token to the mean token of the video, and of its frame: sums of Gaussian kernels of the
    distance between normalized tokens, on the half of the channels that varies least."""
    frames = frames_FNC.to(torch.promote_types(frames_FNC.dtype, torch.float32))
    variance_C = frames.flatten(0, 1).var(dim=0, unbiased=False)
    steady_D = variance_C.sort(stable=True).indices[: max(1, len(variance_C) // 2)]
    unit_FND = normalize(frames.index_select(2, steady_D), dim=-1)
    return kernels(unit_FND, unit_FND.mean(dim=(0, 1))), kernels(unit_FND, unit_FND.mean(dim=1, keepdim=True))


def kernels(unit_FND: Tensor, centre: Tensor) -> Tensor:
    """[F, N] sum over :data:`WIDTHS` of exp(-d^2 / (2 width)), d the distance to ``centre``."""
    squared_FN = (unit_FND - centre).square().sum(dim=-1)
    return torch.stack([torch.exp(-squared_FN / (2 * width)) for width in WIDTHS]).sum(dim=0)


def budgets(of_video_FN: Tensor, share: float) -> Tensor:
    """[F] int64 tokens of each frame, 1 to N, rounded half to even: ``share`` of N, multiplied by 1 plus the frame's
    softmax probability less the mean probability."""
    scores_F = -of_video_FN.mean(dim=1)
    probability_F = ((scores_F - scores_F.max()) / TEMPERATURE).softmax(dim=0)
    shares_F = (share * (1 + probability_F - probability_F.mean())).clamp(max=1.0)
    return (shares_F * of_video_FN.shape[1]).round().long().clamp(min=1)
