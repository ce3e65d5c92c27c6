"""A second data set of the quickstart: images in which words must be read.

Each image shows words on colored signs, on a ground with lines. The words differ in single letters, a sign is as small
as two patches of the vision tower, and a question is about one of the signs, so most visual tokens do not matter for
it, and a few matter much.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vtprune_train.data.synthetic import COLOURS
from vtprune_train.files.disk import replace_synced

PATCH = 14  # side of the vision tower's patches in pixels
SIGN = (2 * PATCH, PATCH)  # width and height in pixels
CANVASES = ((112, 56), (56, 112), (112, 112))  # width and height; as in the recipe, so images are not rescaled
WORDS = ("cat", "dog", "sun", "key", "map", "pie", "fox", "jam")
NUM_SIGNS = 2
NUM_TURNS = 3
FONT_SIZE = 12
LINES = 1 / 600  # of the ground, per pixel
QUESTIONS = {"word": "Which word is {}?", "colour": "Which colour is {}?"}


@dataclass(frozen=True)
class Sign:
    """A word on a ground of one color; ``left`` and ``top`` are in pixels."""

    word: str
    colour: str
    left: int
    top: int


@dataclass(frozen=True)
class Page:
    """An image: its size, the brightness of its ground, the lines on it, and the signs.

    Args:
        lines: ``(x, y, x, y, brightness, width)`` of each line.
    """

    width: int
    height: int
    grey: int
    lines: tuple[tuple[int, int, int, int, int, int], ...]
    signs: tuple[Sign, ...]


def random_page(rng: random.Random) -> Page:
    """A page with signs of different colors and words."""
    width, height = rng.choice(CANVASES)
    grey = rng.randint(100, 135)
    lines = []
    for _ in range(round(LINES * width * height)):
        x, y = rng.randrange(width), rng.randrange(height)
        end = (x + rng.randint(-20, 20), y + rng.randint(-20, 20))
        lines.append((x, y, *end, grey + rng.randint(-45, 45), rng.randint(1, 2)))
    places = [
        (left, top)
        for left in range(0, width - SIGN[0] + 1, SIGN[0])
        for top in range(0, height - SIGN[1] + 1, SIGN[1])
    ]
    signs = zip(
        rng.sample(WORDS, NUM_SIGNS), rng.sample(list(COLOURS), NUM_SIGNS), rng.sample(places, NUM_SIGNS), strict=True
    )
    return Page(width, height, grey, tuple(lines), tuple(Sign(word, colour, *place) for word, colour, place in signs))


def draw_page(page: Page) -> Image.Image:
    """Draw a page with PIL's own font."""
    image = Image.new("RGB", (page.width, page.height), (page.grey,) * 3)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=FONT_SIZE)
    for *ends, brightness, width in page.lines:
        draw.line(ends, fill=(brightness,) * 3, width=width)
    for sign in page.signs:
        box = (sign.left, sign.top, sign.left + SIGN[0] - 1, sign.top + SIGN[1] - 1)
        ground = COLOURS[sign.colour]
        ink = (0, 0, 0) if sum(ground) > 360 else (255, 255, 255)
        draw.rectangle(box, fill=ground)
        middle = (sign.left + SIGN[0] / 2, sign.top + SIGN[1] / 2)
        draw.text(middle, sign.word, font=font, anchor="mm", fill=ink)
    return image


def conversation(rng: random.Random, page: Page) -> list[dict[str, str]]:
    """Questions about the signs in random order, in the LLaVA form."""
    asked = [(QUESTIONS["word"].format(sign.colour), sign.word) for sign in page.signs]
    asked += [(QUESTIONS["colour"].format(sign.word), sign.colour) for sign in page.signs]
    turns = []
    for number, (question, answer) in enumerate(rng.sample(asked, NUM_TURNS)):
        turns.append({"from": "human", "value": question if number else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return turns


def write_dataset(folder: Path, *, num_train: int, num_eval: int, seed: int) -> None:
    """Write ``train.json``, ``eval.json`` and ``images/*.png``, unless the folder already has the same data set."""
    stamp = folder / "made.json"
    made: dict[str, Any] = {"num_train": num_train, "num_eval": num_eval, "seed": seed, "version": 1}
    if stamp.is_file() and stamp.read_text(errors="replace") == json.dumps(made):
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for split, count in (("train", num_train), ("eval", num_eval)):
        records = []
        for number in range(count):
            page, name = random_page(rng), f"{split}-{number:05d}.png"
            draw_page(page).save(folder / "images" / name)
            records.append({"id": f"{split}-{number}", "image": name, "conversations": conversation(rng, page)})
        (folder / f"{split}.json").write_text(json.dumps(records, indent=0))
    replace_synced(stamp, json.dumps(made).encode())
