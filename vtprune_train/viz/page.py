"""The surviving tokens as one HTML file: a slider over the stages, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from vtprune_train.viz.draw import DROPPED, FADE, ShownImage

LONGEST = 1344  # pixels of an embedded picture's longer side: two tiles of 336, twice as fine


def page(images: Sequence[ShownImage], stages: Sequence[str], title: str = "") -> str:
    """A self-contained page. ``#stage=2`` behind its address opens it at the second stage.

    Args:
        images: as :func:`vtprune_train.viz.draw.draw` takes them.
        stages: their headings.
        title: for example the prompt.
    """
    data = {"stages": list(stages), "images": [_image(shown) for shown in images]}
    filled = {
        "%TITLE%": html.escape(title or "Visual tokens that survive each stage"),
        "%COUNT%": str(len(stages)),
        "%FADED%": f"rgb({DROPPED[0]} {DROPPED[1]} {DROPPED[2]} / {FADE})",
        "%DATA%": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),  # so that no text ends the script
    }
    return re.sub("|".join(filled), lambda found: filled[found[0]], PAGE)


def _image(shown: ShownImage) -> dict[str, Any]:
    """What the page needs of one image; boxes in pixels of the original, to a hundredth."""
    height, width = shown.places.size
    return {
        "width": width,
        "height": height,
        "picture": _data_url(shown.picture),
        "panels": shown.panels(),
        "kinds": shown.places.kinds.tolist(),
        "boxes": shown.places.boxes.round(2).tolist(),
        "kept": [tokens.tolist() for tokens in shown.kept],
    }


def _data_url(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail((LONGEST, LONGEST))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>%TITLE%</title>
<style>
:root { --paper: #fff; --ink: #1d2433; --soft: #667085; --rule: #d5dae3; --newline: #0f9d8a; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171f; --ink: #e6e9f0; --soft: #98a2b3; --rule: #343b4a; --newline: #2dd4bf; }
}
body { margin: 0 auto; max-width: 1280px; padding: 0 16px 32px; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 16px 0 4px; overflow-wrap: anywhere; }
header { position: sticky; top: 0; z-index: 1; background: var(--paper); padding: 6px 0 10px;
  border-bottom: 1px solid var(--rule); }
label { display: block; font-weight: 600; }
input { width: 100%; margin: 6px 0 0; height: 28px; accent-color: var(--newline); }
h2 { font-size: 1rem; font-weight: 600; margin: 18px 0 8px; }
.panels { display: flex; flex-wrap: wrap; gap: 16px; }
figure { margin: 0; flex: 1 1 300px; min-width: 0; max-width: 620px; }
svg { display: block; width: 100%; max-height: 78vh; }
path { fill-rule: evenodd; shape-rendering: crispEdges; }
.grey { fill: #808080; mix-blend-mode: saturation; }
.dropped { fill: %FADED%; }
.frame { fill: none; stroke: var(--rule); vector-effect: non-scaling-stroke; }
.newline { fill: var(--rule); shape-rendering: crispEdges; }
.newline.kept { fill: var(--newline); }
figcaption { color: var(--soft); font-size: .9rem; font-variant-numeric: tabular-nums; margin-top: 4px; }
figcaption b { color: var(--newline); font-weight: 400; }
</style>
</head>
<body>
<h1>%TITLE%</h1>
<header>
<label for="stage" id="heading" aria-live="polite"></label>
<input type="range" id="stage" min="1" max="%COUNT%" value="1" step="1" autofocus>
</header>
<main></main>
<noscript>This page draws its pictures with JavaScript.</noscript>
<script type="application/json" id="data">%DATA%</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const slider = document.getElementById("stage");
const count = (image, tokens, kind) => tokens.filter(token => image.kinds[token] === kind).length;

// One SVG for each kind of an image; its paths cover everything but the tokens that are left.
document.querySelector("main").innerHTML = data.images.map((image, i) => {
  const strip = image.kinds.includes("newline") ? 0.04 * image.width : 0;
  const figures = image.panels.map(kind => {
    const marks = kind === "grid" ? image.kinds.map((of, token) => {
      if (of !== "newline") return "";
      const [left, top, , bottom] = image.boxes[token];
      return `<rect class="newline" data-token="${token}" x="${left + strip / 4}" y="${top}"
        width="${strip * 3 / 4}" height="${(bottom - top) * 0.85}"/>`;
    }).join("") : "";
    return `<figure><svg viewBox="0 0 ${image.width + strip} ${image.height}" preserveAspectRatio="xMinYMin"
      role="img" aria-label="${kind} tokens that are left"><image href="${image.picture}" width="${image.width}"
      height="${image.height}" preserveAspectRatio="none"/>
      <path class="grey" data-kind="${kind}"/><path class="dropped" data-kind="${kind}"/>
      <rect class="frame" width="${image.width}" height="${image.height}"/>${marks}</svg>
      <figcaption data-kind="${kind}"></figcaption></figure>`;
  });
  return `<section data-image="${i}"><h2></h2><div class="panels">${figures.join("")}</div></section>`;
}).join("");

function draw(stage) {
  slider.value = stage;
  slider.setAttribute("aria-valuetext", data.stages[stage - 1]);
  document.getElementById("heading").textContent = data.stages[stage - 1];
  document.querySelectorAll("section").forEach((section, i) => {
    const image = data.images[i], all = image.kept[0], kept = image.kept[stage - 1];
    const name = data.images.length > 1 ? `picture ${i + 1}: ` : "";
    const share = Number((100 * kept.length / all.length).toPrecision(3));
    section.querySelector("h2").textContent = `${name}${kept.length} of ${all.length} tokens (${share}%)`;
    section.querySelectorAll("path").forEach(path => {
      const holes = kept.filter(token => image.kinds[token] === path.dataset.kind).map(token => {
        const [left, top, right, bottom] = image.boxes[token];
        return `M${left} ${top}H${right}V${bottom}H${left}Z`;
      });
      path.setAttribute("d", `M0 0H${image.width}V${image.height}H0Z` + holes.join(""));
    });
    section.querySelectorAll("figcaption").forEach(caption => {
      const line = kind => `${kind} ${count(image, kept, kind)} of ${count(image, all, kind)}`;
      const newlines = caption.dataset.kind === "grid" && image.kinds.includes("newline");
      caption.innerHTML = line(caption.dataset.kind) + (newlines ? `, <b>${line("newline")}</b>` : "");
    });
    const left = new Set(kept);
    section.querySelectorAll(".newline").forEach(mark => mark.classList.toggle("kept", left.has(+mark.dataset.token)));
  });
}

function drawAsked() {
  const asked = parseInt(new URLSearchParams(location.hash.slice(1)).get("stage") || "1", 10) || 1;
  draw(Math.min(Math.max(asked, 1), data.stages.length));
}

slider.addEventListener("input", () => {
  draw(+slider.value);
  history.replaceState(null, "", "#stage=" + slider.value);
});
// Arrow keys move the stage wherever the focus is; on the slider itself they do so already.
document.addEventListener("keydown", event => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step || event.target === slider || event.ctrlKey || event.altKey || event.metaKey) return;
  slider.value = +slider.value + step;
  slider.dispatchEvent(new Event("input"));
});
window.addEventListener("hashchange", drawAsked);
drawAsked();
</script>
</body>
</html>
"""
