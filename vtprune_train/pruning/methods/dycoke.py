"""DyCoke (arXiv 2411.15024), temporal token merging: the first of every four frames is kept whole, and the other three
keep the visual tokens that differ most from an earlier frame.

Source: ``dycole_ttm`` in ``llava/model/llava_arch.py`` of KD-TAO/DyCoke at dd74634.

Shape suffixes: F steps in time, N tokens of a step, C hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vtprune_train.core.rounding import as_fraction, floor_of
from vtprune_train.core.stream import Boundary, Drop
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.methods.one_share import OneShare
from vtprune_train.pruning.ops.videos import Steps, VideoDrop, check_per_video, picked_per_video, video_tokens
from vtprune_train.pruning.setting_types import Share

WINDOW = 4  # frames


class DyCoke(OneShare):
    """In every four frames of a video, the second and the third are compared with the first, and the fourth with the
    third. A compared frame of n tokens keeps the ``floor(keep * n)`` tokens least similar to the token at the same
    location. The first of the four frames is kept whole, and so are images.

    Args:
        keep: keep ratio of a frame that is compared, in (0, 1]; 0.3 (published) keeps 0.475 of a video.
        positions: ``renumber`` numbers the kept tokens 0, 1, ... (published); ``keep`` keeps their positions.
    """

    keep: Share = 0.3

    name = "dycoke"
    paper = "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models (arXiv 2411.15024)"

    def __post_init__(self) -> None:
        check_per_video(self.name, self.per)

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        of_video = (1 + (WINDOW - 1) * as_fraction(self.keep)) / WINDOW
        return (_WindowDrop(0, float(of_video), compared=self.keep),)

    @torch.no_grad()
    def choose(self, candidates: Candidates) -> Selection:
        def pick(frames_FNC: Tensor, count: int) -> Tensor:
            return changed(frames_FNC, floor_of(self.keep, frames_FNC.shape[1]))

        return Selection(picked_per_video(candidates.hidden.detach(), candidates.boundary, pick))

    def selector_flops(self, hidden: int, boundary: Boundary) -> float:
        return 6.0 * hidden * video_tokens(boundary.spans)


@dataclass(frozen=True)
class _WindowDrop(VideoDrop):
    """Keeps the share ``compared`` of the tokens of every frame except the first of each window."""

    compared: float = 1.0

    def of_steps(self, steps: Steps) -> int:
        whole = -(-steps.count // WINDOW)
        return whole * steps.size + (steps.count - whole) * floor_of(self.compared, steps.size)


def changed(frames_FNC: Tensor, count: int) -> Tensor:
    """Int64 indices into F * N: all tokens of every fourth frame, and the ``count`` tokens of each other frame that are
    least similar (cosine, in float32 at least) to the frame it is compared with. Ties go to the earlier token."""
    frames = frames_FNC.to(torch.promote_types(frames_FNC.dtype, torch.float32))
    index_FN = torch.arange(frames.shape[0] * frames.shape[1], device=frames.device).view(frames.shape[:2])
    kept = [index_FN[::WINDOW].flatten()]
    for first, stride, back in ((1, 2, 1), (2, WINDOW, 2)):  # every odd frame; the third of each window
        later = slice(first, None, stride)
        similarity = cosine_similarity(frames[later], frames[first - back :: stride][: len(frames[later])], dim=-1)
        best = similarity.sort(dim=1, stable=True).indices[:, :count]
        kept.append(index_FN[later].gather(1, best).flatten())
    return torch.cat(kept)
