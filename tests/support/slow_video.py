"""EVS, VidCom2, DyCoke and PruneVid for one video, by plain loops over frames and places, written from the papers and
the published code; used only to compare with. And random samples with images and videos.

A video is [frames, places, channels] in float64; a token is (frame, place).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from hypothesis import strategies as st

from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.pruning.candidates import Candidates


@dataclass(frozen=True)
class Clip:
    """What a sample shows: a video, or an image if it has no frames; ``newline`` adds a token of no frame."""

    frames: int
    rows: int
    columns: int
    newline: bool = False

    @property
    def grids(self):
        return ((self.rows, self.columns),) * max(1, self.frames) + ((1, 1),) * self.newline

    @property
    def tokens(self):
        return sum(rows * columns for rows, columns in self.grids)

    @property
    def places(self):
        return self.rows * self.columns


CLIPS = st.builds(Clip, st.integers(0, 9), st.integers(1, 4), st.integers(1, 5), st.booleans())
SAMPLES = st.lists(st.lists(CLIPS, max_size=2), min_size=1, max_size=3)


def layouts(samples):
    """A question behind the clips of each sample, which touch each other."""
    made = []
    for key, clips in enumerate(samples):
        spans, offset = [], 2
        for clip in clips:
            spans.append(ImageSpan(offset, clip.tokens, clip.grids, frames=clip.frames))
            offset += clip.tokens
        made.append(SegmentLayout(offset + 4, tuple(spans), (offset + 1,), (offset + 2, offset + 3), key))
    return made


def video(seed, frames, places, channels=16, moving=0.4):
    """[frames, places, channels] float64: two scenes, in which some places change in each frame and the others nearly
    do not."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scenes, made = random(2, places, channels), []
    for frame in range(frames):
        moves = torch.rand(places, 1, generator=generator) < moving
        made.append(torch.where(moves, random(places, channels), scenes[2 * frame // frames]))
    return torch.stack(made) + 0.2 * random(frames, places, channels)


class Scene:
    """Candidates at the boundary of a method, and what it chooses of each clip."""

    def __init__(self, method, samples, seed=0):
        self.clips = [clip for clips in samples for clip in clips]
        self.boundary = method.plan(layouts(samples), 4).boundaries[0]
        parts = [
            torch.cat([video(seed + n, max(1, c.frames), c.places).flatten(0, 1), video(seed, 1, int(c.newline))[0]])
            for n, c in enumerate(self.clips)
        ]
        self.hidden = torch.cat([torch.zeros(0, 16, dtype=torch.float64), *parts])

    def candidates(self, hidden=None):
        hidden = self.hidden if hidden is None else hidden
        return Candidates(self.boundary, hidden, hidden, hidden[:0])

    def of_clips(self, selection):
        """For each clip: its tokens [n, C], the indices of those chosen, and their contents [k, C]."""
        contents = self.hidden[selection.chosen]
        if selection.at is not None:
            contents = contents.index_copy(0, selection.at, selection.values)
        counts = selection.counts
        counts = [span.after for span in self.boundary.spans] if counts is None else counts.tolist()
        first, found = 0, []
        sizes = [clip.tokens for clip in self.clips]
        parts = zip(self.hidden.split(sizes), selection.chosen.split(counts), contents.split(counts), strict=True)
        for tokens, chosen, content in parts:
            found.append((tokens, (chosen - first).tolist(), content))
            first += len(tokens)
        return found


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def slow_evs(frames, keep):
    """Tokens by how much they changed, the first frame before all."""
    count, places = len(frames), len(frames[0])
    tokens = [(f, p) for f in range(count) for p in range(places)]
    changed = {(f, p): 255.0 if f == 0 else 1 - cosine(frames[f, p], frames[f - 1, p]) for f, p in tokens}
    kept = max(places, math.floor(round(keep * 1000) * count * places / 1000 + 1e-9))
    return sorted(sorted(tokens, key=lambda token: (-changed[token], token))[:kept])


def slow_dycoke(frames, keep):
    kept, places = [], len(frames[0])
    few = math.floor(round(keep * 1000) * places / 1000 + 1e-9)
    for frame in range(len(frames)):
        other = frame - {0: 0, 1: 1, 2: 2, 3: 1}[frame % 4]
        alike = [cosine(frames[frame, p], frames[other, p]) for p in range(places)]
        best = sorted(range(places), key=lambda p: (alike[p], p))[: places if other == frame else few]
        kept += [(frame, p) for p in sorted(best)]
    return kept


def slow_vidcom2(frames, keep):
    """Budgets of frames, the most distinct tokens of each; then one token after the other goes or comes, until the
    share ``keep`` is left."""
    count, places, channels = frames.shape
    variances = [
        float(np.var([float(frames[f, p, c]) for f in range(count) for p in range(places)])) for c in range(channels)
    ]
    steady = sorted(range(channels), key=lambda c: variances[c])[: channels // 2]
    unit = frames[:, :, steady]
    unit = unit / unit.norm(dim=-1, keepdim=True)
    of_video = sum(unit[f, p] for f in range(count) for p in range(places)) / (count * places)

    def likeness(a, b):
        return sum(math.exp(-float((a - b) @ (a - b)) / (2 * width)) for width in (0.125, 0.25, 0.5, 1, 2))

    distinct, alike = [], {}
    for f in range(count):
        of_frame = sum(unit[f, p] for p in range(places)) / places
        to_video = [likeness(unit[f, p], of_video) for p in range(places)]
        distinct.append(-sum(to_video) / places)
        alike.update({(f, p): to_video[p] + likeness(unit[f, p], of_frame) for p in range(places)})
    raised = [math.exp((d - max(distinct)) / 0.01) for d in distinct]
    kept = []
    for f in range(count):
        share = min(1.0, keep * (1 + raised[f] / sum(raised) - 1 / count))
        kept += sorted([(f, p) for p in range(places)], key=alike.get)[: max(1, round(share * places))]
    target = max(count, math.floor(round(keep * 1000) * count * places / 1000 + 1e-9))
    while len(kept) > target:
        several = [token for token in kept if sum(token[0] == frame for frame, _ in kept) > 1]
        kept.remove(max(several, key=alike.get))
    while len(kept) < target:
        kept.append(min((token for token in alike if token not in kept), key=alike.get))
    return sorted(kept)


def slow_clusters(tokens, number):
    """The centres, best first, and the members of each: density peaks with the density of seven neighbours."""
    n = len(tokens)
    far = [[float((a - b).norm()) / math.sqrt(len(a)) for b in tokens] for a in tokens]
    density = [math.exp(-sum(d * d for d in sorted(row)[:7]) / min(7, n)) for row in far]
    longest = max(map(max, far))
    gap = [min((far[i][j] for j in range(n) if density[j] > density[i]), default=longest) for i in range(n)]
    centres = sorted(range(n), key=lambda i: -density[i] * gap[i])[:number]
    members = [[centre] for centre in centres]
    for i in range(n):
        if i not in centres:
            members[min(range(number), key=lambda c: far[centres[c]][i])].append(i)
    return members


def slow_scenes(labels):
    """Lengths of scenes. Runs of a label that are shorter than its longest, and single frames, join a neighbour."""
    runs = [(label, len(list(run))) for label, run in groupby(labels)]
    longest = {label: max(n for other, n in runs if other == label) for label, _ in runs}
    frames = [label if n == longest[label] > 1 else None for label, n in runs for _ in range(n)]
    while None in frames:
        start = frames.index(None)
        end = next((i for i in range(start, len(frames)) if frames[i] is not None), len(frames))
        before = next(((label, len(list(run))) for label, run in groupby(frames[:start][::-1])), (None, 0))
        after = next(((label, len(list(run))) for label, run in groupby(frames[end:])), (None, 0))
        joined = before[0] if before[1] >= after[1] else after[0]
        frames[start:end] = [0 if joined is None else joined] * (end - start)
    return [len(list(run)) for _, run in groupby(frames)]


def slow_prunevid(frames, tau, segments, clusters):
    """[(the token whose position it takes, content)] in order."""
    count, places = len(frames), len(frames[0])
    means = [sum(frames[f, p] for p in range(places)) / places for f in range(count)]
    number = max(1, math.floor(segments * count + 1e-9))
    labels = [0] * count
    for label, members in enumerate(slow_clusters(means, number)):
        for member in members:
            labels[member] = label
    merged, start = [], 0
    for length in slow_scenes(labels):
        scene = range(start, start + length)
        pairs = [(f, g) for f in scene for g in scene if f != g]
        alike = [sum(cosine(frames[f, p], frames[g, p]) for f, g in pairs) / max(1, len(pairs)) for p in range(places)]
        still = [p for p in range(places) if pairs and alike[p] > tau]
        moving = [p for p in range(places) if p not in still]
        sets = [[((start, p), sum(frames[f, p] for f in scene) / length) for p in still]]
        sets += [[((f, p), frames[f, p]) for p in moving] for f in scene]
        for tokens in sets:
            if len(tokens) <= 14:
                merged += tokens
                continue
            for members in slow_clusters(
                [content for _, content in tokens], max(1, math.floor(clusters * len(tokens) + 1e-9))
            ):
                merged.append((tokens[members[0]][0], sum(tokens[i][1] for i in members) / len(members)))
        start += length
    return merged
