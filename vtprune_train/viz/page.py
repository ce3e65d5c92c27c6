"""The kept tokens as one HTML file (``page.html``, filled in): a slider over the stages, nothing loaded from afar."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtprune_train.viz.draw import DROPPED, FADE, ShownImage

LONGEST = 1344  # pixels of an embedded image's longer side: two tiles of 336, twice as fine
PAGE = Path(__file__).with_name("page.html")


def page(images: Sequence[ShownImage], stages: Sequence[str], title: str = "") -> str:
    """A self-contained page. ``#stage=2`` after its address opens it at the second stage.

    Args:
        images: as :func:`vtprune_train.viz.draw.draw` takes them.
        stages: their headings.
        title: for example the prompt.
    """
    data = {"stages": list(stages), "images": [_image(shown) for shown in images]}
    filled = {
        "%TITLE%": html.escape(title or "Visual tokens kept in each stage"),
        "%COUNT%": str(len(stages)),
        "%FADED%": f"rgb({DROPPED[0]} {DROPPED[1]} {DROPPED[2]} / {FADE})",
        "%DATA%": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),  # so that no text ends the script
    }
    return re.sub("|".join(filled), lambda match: filled[match[0]], PAGE.read_text(encoding="utf-8"))


def _image(shown: ShownImage) -> dict[str, Any]:
    """What the page needs of one image; boxes in pixels of the original, to a hundredth."""
    height, width = shown.places.size
    small = shown.image.convert("RGB")
    small.thumbnail((LONGEST, LONGEST))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return {
        "width": width,
        "height": height,
        "picture": f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "panels": shown.panels(),
        "kinds": shown.places.kinds.tolist(),
        "boxes": shown.places.boxes.round(2).tolist(),
        "kept": [tokens.tolist() for tokens in shown.kept],
    }
