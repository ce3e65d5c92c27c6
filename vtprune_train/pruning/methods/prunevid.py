"""PruneVid (arXiv 2412.16117), spatial-temporal merging: a video is split into scenes; static locations are merged over
the frames of a scene, and then similar tokens are merged within each frame.

Source: ``PllavaForConditionalGeneration.merge_frames_dynamic`` in ``models/pllava/modeling_pllava.py`` of
Visual-AI/PruneVid at b12600c.

Shape suffixes: F steps in time, N tokens of a step, M tokens of a set, C hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vtprune_train.core.rounding import floor_of
from vtprune_train.core.stream import Boundary, Drop, to_device
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.needs import Needs, Positions
from vtprune_train.pruning.ops.grids import shared
from vtprune_train.pruning.ops.recycling import density_peaks, merge_clusters
from vtprune_train.pruning.ops.scenes import scenes_of
from vtprune_train.pruning.ops.videos import VideoDrop, steps_of, video_tokens, with_steps
from vtprune_train.pruning.schedules.budget import scaled_to_budget
from vtprune_train.pruning.setting_types import Share

NEIGHBOURS = 7  # number of nearest tokens that determine the density
SMALL = 14  # sets of at most this many tokens are not clustered
EXPECTED = 0.4  # planned share of an adaptive drop; published: 16.2% remain after the second part, which keeps 0.4


class PruneVid(PruningMethod):
    """Each video is split into scenes by clustering its frames. In a scene, the tokens of a static location, whose mean
    similarity over the frames is above ``tau``, are merged into their mean. The merged tokens, and the other tokens of
    each frame, are then clustered and replaced by the clusters' means. Without ``keep``, the number of tokens depends
    on the video. Images are kept whole.

    Args:
        keep: fixed keep ratio of a video in (0, 1] (floor, at least one token), distributed over the sets of tokens in
            proportion to their sizes; ``None`` keeps the share ``clusters`` of each set.
        tau: mean cosine similarity over the frames of a scene above which a location is static, in [-1, 1].
        segments: number of frame clusters, as a share of the frames (floor, at least one), in (0, 1].
        clusters: number of clusters of a set of more than 14 tokens, as a share of them (floor), in (0, 1].
        positions: ``renumber`` numbers the remaining tokens 0, 1, ... (published); ``keep`` gives each the position of
            its cluster's centre.
    """

    keep: Share | None = None
    tau: Annotated[float, Field(ge=-1, le=1)] = 0.8
    segments: Share = 0.25
    clusters: Share = 0.5
    positions: Positions = "renumber"

    name = "prunevid"
    paper = "PruneVid: Visual Token Pruning for Efficient Video Large Language Models (arXiv 2412.16117)"
    where = "before the decoder"
    trains = "yes; gradients reach merged tokens too"

    @property
    def needs(self) -> Needs:
        return Needs(positions=self.positions)

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        return (VideoDrop(0, EXPECTED if self.keep is None else self.keep, adaptive=self.keep is None),)

    def for_budget(self, share: float, num_layers: int) -> PruningMethod:
        return scaled_to_budget(replace(self, keep=self.keep or EXPECTED), share, num_layers)

    def choose(self, candidates: Candidates) -> Selection:
        boundary, hidden, device = candidates.boundary, candidates.hidden, candidates.hidden.device
        spans = list(with_steps(boundary.spans))
        videos = {
            number: (steps.of(hidden[first:]), span.after - steps.rest)
            for number, (span, first, steps) in enumerate(spans)
            if steps is not None
        }
        sets = dict(zip(videos, self._sets(list(videos.values())), strict=True))
        chosen, at, values = [boundary.span_of_visual[:0]], [boundary.span_of_visual[:0]], [hidden[:0]]
        counts: list[int] = []
        for number, (span, first, steps) in enumerate(spans):
            merged, of_steps = 0, 0
            if steps is not None:
                centres, means = merged_sets(videos[number][0], *sets[number])
                merged, place, of_steps = len(centres), sum(counts), steps.tokens
                chosen.append(first + centres)
                at.append(torch.arange(place, place + merged, device=device))
                values.append(means)
            # An image, or the tokens of no step.
            chosen.append(torch.arange(first + of_steps, first + span.before, device=device))
            counts.append(merged + span.before - of_steps)
        measured = torch.tensor(counts, dtype=torch.int64) if boundary.drop.adaptive and videos else None
        return Selection(torch.cat(chosen), torch.cat(at), torch.cat(values), measured)

    @torch.no_grad()
    def _sets(self, videos: Sequence[tuple[Tensor, int]]) -> list[tuple[list[TokenSet], list[int]]]:
        """The sets of tokens of each video and the number of tokens that each is merged into.

        Args:
            videos: [F, N, C] tokens of each, and the planned number of tokens after the drop.
        """
        if not videos:
            return []
        frames = [frames_FNC.detach() for frames_FNC, _ in videos]
        labels = on_host([frame_clusters(frames_FNC, self.segments) for frames_FNC in frames])
        scenes = [scenes_of(labels_F) for labels_F in labels]
        still = on_host(
            [
                torch.stack([stillness(frames_FNC[start:end]) for start, end in of_video])
                for frames_FNC, of_video in zip(frames, scenes, strict=True)
            ]
        )
        sets_of_videos = []
        for frames_FNC, (_, planned), of_video, similarity in zip(frames, videos, scenes, still, strict=True):
            spare = None if self.keep is None else frames_FNC.shape[:2].numel() - planned
            sets = token_sets(of_video, merged_places(of_video, similarity, self.tau, spare))
            sets_of_videos.append((sets, self._targets([len(places) for _, places in sets], planned)))
        return sets_of_videos

    def _targets(self, sizes: Sequence[int], planned: int) -> list[int]:
        if self.keep is not None:
            return shared(planned, sizes)
        return [size if size <= SMALL else max(1, floor_of(self.clusters, size)) for size in sizes]

    def selector_flops(self, hidden: int, boundary: Boundary) -> float:
        """Frame similarities, then distances and means within each frame, if nothing is static."""
        spans = [(steps_of(span, span.before), span.after) for span in boundary.spans]
        pairs = sum(steps.tokens * steps.size + steps.tokens * after / steps.count for steps, after in spans if steps)
        return 2.0 * hidden * pairs + 4.0 * hidden * video_tokens(boundary.spans)


TokenSet = tuple[tuple[int, int], np.ndarray]
"""Frames [start, end), over which tokens are averaged, and the locations of the tokens within a frame."""


def on_host(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Copy tensors to the host in one device-to-host copy."""
    values = np.array(torch.cat([tensor.flatten() for tensor in tensors]).tolist())
    parts = np.split(values, np.cumsum([tensor.numel() for tensor in tensors])[:-1])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def frame_clusters(frames_FNC: Tensor, share: float) -> Tensor:
    """[F] int64, the cluster of each frame's mean token; means and distances in float32 at least."""
    num_frames = len(frames_FNC)
    clusters = max(1, floor_of(share, num_frames))
    means_FC = frames_FNC.mean(dim=1, dtype=torch.promote_types(frames_FNC.dtype, torch.float32))
    return density_peaks(means_FC, clusters, min(NEIGHBOURS, num_frames))[1]


def stillness(frames_FNC: Tensor) -> Tensor:
    """[N] float32: mean cosine similarity of the tokens at a location in different frames; -1 if there is one frame."""
    num_frames = len(frames_FNC)
    if num_frames == 1:
        return torch.full(frames_FNC.shape[1:2], -1.0, device=frames_FNC.device)
    unit = normalize(frames_FNC.float(), dim=-1)
    pairs_N = unit.sum(dim=0).square().sum(dim=-1) - num_frames  # cosines of all ordered pairs of different frames
    return pairs_N / (num_frames * (num_frames - 1))


def merged_places(
    scenes: Sequence[tuple[int, int]], still: np.ndarray, tau: float, spare: int | None = None
) -> np.ndarray:
    """[scenes, N] bool: locations above ``tau``, which are merged over the frames of their scene. With ``spare``, only
    the most similar ones, so that merging removes at most ``spare`` tokens.

    Args:
        scenes: frames [start, end) of each.
        still: [scenes, N], see :func:`stillness`.
        tau: threshold.
        spare: maximum number of tokens to remove; ``None`` for no limit.
    """
    merged = still > tau
    if spare is not None:
        saved = np.repeat([end - start - 1 for start, end in scenes], still.shape[1])
        order = np.argsort(-still, axis=None, kind="stable")
        merged.flat[order[np.cumsum(saved[order]) > spare]] = False
    return merged


def token_sets(scenes: Sequence[tuple[int, int]], merged: np.ndarray) -> list[TokenSet]:
    """For each scene, the merged locations as one set, then the other tokens of each frame; empty sets are left out."""
    sets: list[TokenSet] = []
    for (start, end), of_scene in zip(scenes, merged, strict=True):
        sets.append(((start, end), np.flatnonzero(of_scene)))
        sets += [((frame, frame + 1), np.flatnonzero(~of_scene)) for frame in range(start, end)]
    return [part for part in sets if len(part[1])]


def merged_sets(frames_FNC: Tensor, sets: Sequence[TokenSet], targets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Average each set over its frames and merge it into clusters, in float32 at least.

    Args:
        frames_FNC: a video's tokens; gradients flow to all of them that are merged.
        sets: which tokens are merged with each other.
        targets: number of clusters of each set, at most its number of tokens; if equal, its tokens are not clustered. A
            set with 0 clusters is dropped.

    Returns:
        [K] int64 indices into F * N, the centre of each cluster (in the first of its frames), set by set, best first;
        [K, C] the clusters' means, in the precision of ``frames_FNC``.
    """
    size, dtype = frames_FNC.shape[1], torch.promote_types(frames_FNC.dtype, torch.float32)
    indices = to_device(tuple(places for _, places in sets), frames_FNC.device)
    centres, means = [torch.zeros(0, dtype=torch.int64, device=frames_FNC.device)], [frames_FNC[0, :0]]
    for ((start, end), _), places, count in zip(sets, indices, targets, strict=True):
        if not count:
            continue
        tokens_MC = frames_FNC[start:end].index_select(1, places).mean(dim=0, dtype=dtype)
        if count < len(tokens_MC):
            best, cluster = density_peaks(tokens_MC.detach(), count, min(NEIGHBOURS, len(tokens_MC)))
            tokens_MC, places = merge_clusters(tokens_MC, cluster, count, True), places.index_select(0, best)
        centres.append(start * size + places)
        means.append(tokens_MC.to(frames_FNC.dtype))
    return torch.cat(centres), torch.cat(means)
