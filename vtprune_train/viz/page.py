"""Writes the kept tokens as a self-contained HTML file with a slider over the stages, from the template
``page.html``."""

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

LONGEST = 1344  # pixels of the longer side of an embedded image: two tiles of 336 at double resolution
PAGE = Path(__file__).with_name("page.html")


def page(images: Sequence[ImageStages], stages: Sequence[str], title: str = "") -> str:
    """The HTML of the page. ``#stage=2`` in its address opens the second stage.

    Args:
        images: see :func:`vtprune_train.viz.draw.draw`.
        stages: headings of the stages.
        title: for example the prompt.
    """
    data = {"stages": list(stages), "images": [_image(item) for item in images]}
    filled = {
        "%TITLE%": html.escape(title or "Visual tokens kept in each stage"),
        "%COUNT%": str(len(stages)),
        "%FADED%": f"rgb({DROPPED[0]} {DROPPED[1]} {DROPPED[2]} / {FADE})",
        "%DATA%": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),  # text must not end the script
    }
    return re.sub("|".join(filled), lambda match: filled[match[0]], PAGE.read_text(encoding="utf-8"))


def _image(item: ImageStages) -> dict[str, Any]:
    """One image's data for the page; boxes are in pixels of the original, rounded to hundredths."""
    height, width = item.places.size
    small = item.image.convert("RGB")
    small.thumbnail((LONGEST, LONGEST))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return {
        "width": width,
        "height": height,
        "picture": f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "panels": item.panels(),
        "kinds": item.places.kinds.tolist(),
        "boxes": item.places.boxes.round(2).tolist(),
        "kept": [tokens.tolist() for tokens in item.kept],
    }
