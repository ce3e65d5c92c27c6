"""Draws the visual tokens of a video that are kept at each stage: one row per stage, the frames side by side.

Shape suffixes: K kept tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vtprune_train.models.families.layout import Clip, ImageLayout
from vtprune_train.models.families.places import Places
from vtprune_train.models.io.video_processor import DecodedVideo
from vtprune_train.viz.draw import (
    GAP,
    INK,
    LINE,
    MARGIN,
    PAPER,
    RULE,
    SOFT,
    ImageStages,
    draw,
    font,
    panel,
    share_of,
    wrapped,
)

FRAME = (200, 200)  # maximum width and height of a frame
MOST = 8  # maximum number of frames in a row; evenly spaced in longer videos
SPACE = 10  # between frames


@dataclass(frozen=True)
class VideoStages:
    """One video and its kept tokens at each stage.

    Args:
        frames: for each step in time, its first frame and the tokens of the step.
        seconds: time of each of these frames.
    """

    frames: Sequence[ImageStages]
    seconds: Sequence[float]

    @classmethod
    def of(cls, video: DecodedVideo, layout: ImageLayout, kept: Iterator[Sequence[np.ndarray]]) -> VideoStages:
        """Divide the kept tokens of a video by steps in time.

        Args:
            video: the video.
            layout: the layout that sampled it.
            kept: for each span of visual tokens, the indices [K] that are kept after each drop. The spans of this video
                are consumed: one, or one for each frame in families whose frames are images.
        """
        tokens = layout.video_tokens(video.clip)
        place = layout.frame_places(video.clip)
        size = len(place.kinds)
        steps = tokens.frames or len(tokens.runs)
        if tokens.frames:
            whole = [np.arange(tokens.total), *next(kept)]
            edges = [*(size * step for step in range(steps)), tokens.total]
            divided = [[_between(stage, *edges[step : step + 2]) for stage in whole] for step in range(steps)]
        else:
            divided = [[np.arange(size), *next(kept)] for _ in range(steps)]
        places = [place] * (steps - 1) + [_with_newlines(place, tokens.total - size * steps)]
        first = getattr(layout, "temporal_patch_size", 1)
        return cls(
            [
                ImageStages(Image.fromarray(video.frames[step * first]), places[step], divided[step])
                for step in range(steps)
            ],
            _seconds(video.clip, first, steps),
        )

    @property
    def counts(self) -> list[int]:
        """Number of tokens at each stage."""
        return np.sum([frame.counts for frame in self.frames], axis=0).tolist()  # type: ignore[no-any-return]


def _seconds(clip: Clip, first: int, steps: int) -> list[float]:
    return [clip.indices[step * first] / clip.fps for step in range(steps)]


def _between(tokens: np.ndarray, start: int, end: int) -> np.ndarray:
    """[K] int64, the ``tokens`` in [start, end), counted from ``start``."""
    return tokens[(tokens >= start) & (tokens < end)] - start


def _with_newlines(place: Places, count: int) -> Places:
    """Add the ``count`` newline tokens at the end of a video."""
    height, width = place.size
    boxes = np.array([[width, 0.0, width, height]] * count).reshape(-1, 4)
    return Places(place.size, np.append(place.kinds, ["newline"] * count), np.concatenate([place.boxes, boxes]))


def draw_all(items: Sequence[Any], stages: Sequence[str], title: str = "") -> Image.Image:
    """Draw images and videos below each other.

    Args:
        items: :class:`~vtprune_train.viz.draw.ImageStages` and :class:`VideoStages`.
        stages: names of the stages.
        title: the title, for example the prompt.

    Raises:
        ValueError: see :func:`vtprune_train.viz.draw.draw`.
    """
    images = [item for item in items if isinstance(item, ImageStages)]
    videos = [item for item in items if isinstance(item, VideoStages)]
    parts = [draw(images, stages, title)] if images or not videos else []
    for number, video in enumerate(videos, 1):
        name = f"video {number}" if len(videos) > 1 else ""
        parts.append(draw_video(video, stages, name if parts else " - ".join(filter(None, (title, name)))))
    if len(parts) == 1:
        return parts[0]
    canvas = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), PAPER)
    top = 0
    for part in parts:
        canvas.paste(part, (0, top))
        top += part.height
    return canvas


def draw_video(video: VideoStages, stages: Sequence[str], title: str = "") -> Image.Image:
    """Draw one video.

    Args:
        video: at most :data:`MOST` of its frames are drawn.
        stages: names of the stages.
        title: the title, for example the prompt.
    """
    shown = np.linspace(0, len(video.frames) - 1, min(MOST, len(video.frames))).round().astype(int).tolist()
    height, width = video.frames[0].places.size
    scale = min(FRAME[0] / width, FRAME[1] / height)
    size = max(8, round(width * scale)), max(8, round(height * scale))
    across = max(size[0], 96)  # wide enough for the captions
    total = 2 * MARGIN + max(len(shown) * (across + SPACE) - SPACE, 420)
    lines = wrapped(title, total - 2 * MARGIN)
    top = MARGIN + len(lines) * 28 + (12 if lines else 0)
    row = 30 + size[1] + LINE + GAP
    canvas = Image.new("RGB", (total, top + LINE + len(stages) * row + MARGIN - GAP), PAPER)
    pen = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        pen.text((MARGIN, MARGIN + 28 * number), line, INK, font(20, bold=True))
    which = f"{len(shown)} of {len(video.frames)} frames" if len(shown) < len(video.frames) else f"{len(shown)} frames"
    pen.text((MARGIN, top - 6), which, SOFT, font(14))
    for stage, heading in enumerate(stages):
        y = top + LINE + stage * row
        pen.text((MARGIN, y), heading, INK, font(16, bold=True))
        left = MARGIN + font(16, bold=True).getlength(heading) + 16
        pen.text((left, y + 2), share_of(video.counts[stage], video.counts[0]), SOFT, font(14))
        for column, step in enumerate(shown):
            frame, x = video.frames[step], MARGIN + column * (across + SPACE)
            pen.rectangle((x - 1, y + 29, x + size[0], y + 30 + size[1]), outline=RULE)
            canvas.paste(panel(frame, stage, "grid", size), (x, y + 30))
            caption = f"{video.seconds[step]:.1f} s: {frame.counts[stage]} of {frame.counts[0]}"
            pen.text((x, y + 34 + size[1]), caption, INK, font(12))
    return canvas
