"""A second data set of the quickstart: images in which words must be read.

Each image has two small signs on a ground with lines: a word on a colored sign, and a number in words on a white one. A
sign is two patches of the vision tower wide, so most visual tokens do not matter, a few matter much, and which ones
depends on the question.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vtprune_train.data.synthetic import COLOURS
from vtprune_train.files.disk import replace_synced

PATCH = 14  # side of the vision tower's patches in pixels
SIGN = (2 * PATCH, PATCH)  # width and height in pixels
CANVASES = ((112, 56), (56, 112))  # width and height; tiles of the recipe, so that images are not rescaled
WORDS = ("cat", "dog", "sun", "key", "map", "pie")
NUMBERS = ("one", "two", "six", "ten", "four", "five")
WHITE = (240, 240, 240)
FONT_SIZE = 12
LINES = 1 / 1200  # on the ground, per pixel
QUESTIONS = {"word": "What is written in colour?", "colour": "What colour is it?", "number": "Which number is it?"}
READING = ("word", "number")  # asked in the evaluation; the color, which is learned first, leads to the word


@dataclass(frozen=True)
class Sign:
    """A word on a ground of one color; ``left`` and ``top`` are in pixels."""

    text: str
    ground: tuple[int, int, int]
    left: int
    top: int


@dataclass(frozen=True)
class Page:
    """An image and what there is to read.

    Args:
        width, height: in pixels.
        grey: brightness of the ground.
        lines: ``(x, y, x, y, brightness, width)`` of each line.
        signs: the signs.
        truth: the answer to each of :data:`QUESTIONS`.
    """

    width: int
    height: int
    grey: int
    lines: tuple[tuple[int, ...], ...]
    signs: tuple[Sign, ...]
    truth: dict[str, str]


def random_page(rng: random.Random) -> Page:
    """A page with a word on a colored sign and a number on a white one."""
    width, height = rng.choice(CANVASES)
    grey = rng.randint(100, 135)
    lines = []
    for _ in range(round(LINES * width * height)):
        x, y = rng.randrange(width), rng.randrange(height)
        end = (x + rng.randint(-20, 20), y + rng.randint(-20, 20))
        lines.append((x, y, *end, grey + rng.randint(-45, 45), rng.randint(1, 2)))
    places = [(left, top) for left in range(0, width, SIGN[0]) for top in range(0, height, SIGN[1])]
    here, there = rng.sample(places, 2)
    truth = {"word": rng.choice(WORDS), "colour": rng.choice(list(COLOURS)), "number": rng.choice(NUMBERS)}
    signs = (Sign(truth["word"], COLOURS[truth["colour"]], *here), Sign(truth["number"], WHITE, *there))
    return Page(width, height, grey, tuple(lines), signs, truth)


def draw_page(page: Page) -> Image.Image:
    """Draw a page with PIL's own font."""
    image = Image.new("RGB", (page.width, page.height), (page.grey, page.grey, page.grey))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=FONT_SIZE)
    for *ends, brightness, width in page.lines:
        draw.line(ends, fill=(brightness, brightness, brightness), width=width)
    for sign in page.signs:
        right, bottom = sign.left + SIGN[0], sign.top + SIGN[1]
        draw.rectangle((sign.left, sign.top, right - 1, bottom - 1), fill=sign.ground)
        middle = ((sign.left + right) / 2, (sign.top + bottom) / 2)
        ink = (0, 0, 0) if sum(sign.ground) > 360 else (255, 255, 255)
        draw.text(middle, sign.text, font=font, anchor="mm", fill=ink)
    return image


def conversation(rng: random.Random, truth: dict[str, str], topics: Sequence[str]) -> list[dict[str, str]]:
    """Questions about ``topics`` in random order, in the LLaVA form."""
    turns = []
    for number, topic in enumerate(rng.sample(topics, len(topics))):
        turns.append({"from": "human", "value": QUESTIONS[topic] if number else f"<image>\n{QUESTIONS[topic]}"})
        turns.append({"from": "gpt", "value": truth[topic]})
    return turns


def write_dataset(folder: Path, *, num_train: int, num_eval: int, seed: int) -> None:
    """Write ``train.json``, ``eval.json`` and ``images/*.png``, unless the folder already has the same data set."""
    stamp = folder / "made.json"
    made: dict[str, Any] = {"num_train": num_train, "num_eval": num_eval, "seed": seed, "version": 1}
    if stamp.is_file() and stamp.read_text(errors="replace") == json.dumps(made):
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for split, count, topics in (("train", num_train, list(QUESTIONS)), ("eval", num_eval, READING)):
        records = []
        for number in range(count):
            page, name = random_page(rng), f"{split}-{number:05d}.png"
            draw_page(page).save(folder / "images" / name)
            records.append(
                {"id": f"{split}-{number}", "image": name, "conversations": conversation(rng, page.truth, topics)}
            )
        (folder / f"{split}.json").write_text(json.dumps(records, indent=0))
    replace_synced(stamp, json.dumps(made).encode())
