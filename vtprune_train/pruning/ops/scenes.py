"""Splits the frames of a video into scenes, runs of adjacent frames, from a clustering of them. Host only, numpy.

Source: PruneVid (arXiv 2412.16117), ``refine_clusters`` in ``models/pllava/modeling_pllava.py`` of Visual-AI/PruneVid
at b12600c.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np


def scenes_of(labels: np.ndarray) -> list[tuple[int, int]]:
    """Frames [start, end) of each scene: the runs of equal labels, after short runs have joined a neighbour.

    Only the longest runs of each label remain (all of them if several are equally long; none if they are single
    frames). Frames between two remaining runs join the longer one, or the earlier one if both are equally long. If no
    run remains, the video is one scene.

    Args:
        labels: [frames] cluster of each frame; at least one frame.
    """
    runs = _runs(labels)
    longest: dict[int, int] = {}
    for start, end in runs:
        label = int(labels[start])
        longest[label] = max(longest.get(label, 0), end - start)
    refined = np.full(len(labels), -1)
    for start, end in runs:
        if end - start == longest[int(labels[start])] > 1:
            refined[start:end] = labels[start]
    for start, end in _runs(refined):  # from the front: a run that was joined makes its neighbour longer
        if refined[start] == -1:
            refined[start:end] = _neighbour(refined, start, end)
    return _runs(refined)


def _runs(labels: np.ndarray) -> list[tuple[int, int]]:
    edges = [0, *(np.flatnonzero(labels[1:] != labels[:-1]) + 1).tolist(), len(labels)]
    return list(pairwise(edges))


def _neighbour(labels: np.ndarray, start: int, end: int) -> int:
    """The label of the longer run next to [start, end); 0 if there is none."""
    before, after = labels[:start][::-1], labels[end:]
    lengths = [int(np.argmax(np.append(side != side[0], True))) if len(side) else 0 for side in (before, after)]
    if not any(lengths):
        return 0
    return int(before[0] if lengths[0] >= lengths[1] else after[0])
