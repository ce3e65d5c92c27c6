"""Writes the kept tokens as a self-contained HTML file with a slider over the stages, and one over time for videos,
from the template ``page.html``."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtprune_train.viz.draw import DROPPED, FADE, ImageStages
from vtprune_train.viz.draw_video import VideoStages

LONGEST = 1344  # pixels of the longer side of an embedded image: two tiles of 336 at double resolution
LONGEST_FRAME = 448  # maximum side of a video frame in pixels
PAGE = Path(__file__).with_name("page.html")


def page(images: Sequence[ImageStages | VideoStages], stages: Sequence[str], title: str = "") -> str:
    """The HTML of the page. ``#stage=2`` in its address opens the second stage, ``#stage=2&time=3`` its third frame.

    Args:
        images: images and videos, see :func:`vtprune_train.viz.draw_video.draw_all`.
        stages: headings of the stages.
        title: for example the prompt.
    """
    videos = [item for item in images if isinstance(item, VideoStages)]
    only = [item for item in images if isinstance(item, ImageStages)]
    entries = [_image(item, f"image {n}: " if len(only) > 1 else "", LONGEST) for n, item in enumerate(only, 1)]
    for number, video in enumerate(videos):
        for frame, second in zip(video.frames, video.seconds, strict=True):
            entries.append({**_image(frame, f"{second:.1f} s: ", LONGEST_FRAME), "video": number})
    times = max((len(video.frames) for video in videos), default=1)
    data = {"stages": list(stages), "images": entries}
    filled = {
        "%TITLE%": html.escape(title or "Visual tokens kept in each stage"),
        "%COUNT%": str(len(stages)),
        "%TIMES%": str(times),
        "%HIDDEN%": "" if videos else "hidden",
        "%FADED%": f"rgb({DROPPED[0]} {DROPPED[1]} {DROPPED[2]} / {FADE})",
        "%DATA%": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),  # text must not end the script
    }
    return re.sub("|".join(filled), lambda match: filled[match[0]], PAGE.read_text(encoding="utf-8"))


def _image(item: ImageStages, name: str, longest: int) -> dict[str, Any]:
    """One image's data for the page; boxes are in pixels of the original, rounded to hundredths."""
    height, width = item.places.size
    small = item.image.convert("RGB")
    small.thumbnail((longest, longest))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return {
        "name": name,
        "width": width,
        "height": height,
        "picture": f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "panels": item.panels(),
        "kinds": item.places.kinds.tolist(),
        "boxes": item.places.boxes.round(2).tolist(),
        "kept": [tokens.tolist() for tokens in item.kept],
    }
