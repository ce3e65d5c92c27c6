"""A second data set of the quickstart: images in which a word must be read.

Each image has one word on a small colored sign, on a ground with lines. The sign is two of the 32 patches that the
vision tower sees of the image, and the words have three letters of 7 pixels, so most visual tokens do not matter and a
few matter much.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vtprune_train.data.synthetic import COLOURS, write_records

PATCH = 14  # side of the vision tower's patches in pixels
SIGN = (2 * PATCH, PATCH)  # width and height in pixels
CANVASES = ((112, 56), (56, 112))  # width and height; tiles of the recipe, so that images are not rescaled
WORDS = ("cat", "dog", "sun", "key", "map", "pie")
BRIGHT = ("yellow", "orange")  # grounds with dark letters
FONT_SIZE = 12
LINES = 1 / 1200  # on the ground, per pixel
QUESTIONS = {"word": "What is written?", "colour": "What colour is it?"}
READING = ("word",)  # asked in the evaluation; in training, the color, which is learned first, leads to the word


@dataclass(frozen=True)
class Page:
    """An image.

    Args:
        width, height: in pixels.
        grey: brightness of the ground.
        lines: ``(x, y, x, y, brightness, width)`` of each line.
        word, colour: of the sign.
        left, top: of the sign, in pixels.
    """

    width: int
    height: int
    grey: int
    lines: tuple[tuple[int, ...], ...]
    word: str
    colour: str
    left: int
    top: int

    @property
    def truth(self) -> dict[str, str]:
        """The answer to each of :data:`QUESTIONS`."""
        return {"word": self.word, "colour": self.colour}


def random_page(rng: random.Random) -> Page:
    """A page with random lines and a random sign, aligned with the patches."""
    width, height = rng.choice(CANVASES)
    grey = rng.randint(100, 135)
    lines = []
    for _ in range(round(LINES * width * height)):
        x, y = rng.randrange(width), rng.randrange(height)
        end = (x + rng.randint(-20, 20), y + rng.randint(-20, 20))
        lines.append((x, y, *end, grey + rng.randint(-45, 45), rng.randint(1, 2)))
    left, top = rng.randrange(0, width, SIGN[0]), rng.randrange(0, height, SIGN[1])
    return Page(width, height, grey, tuple(lines), rng.choice(WORDS), rng.choice(list(COLOURS)), left, top)


def draw_page(page: Page) -> Image.Image:
    """Draw a page with PIL's own font."""
    image = Image.new("RGB", (page.width, page.height), (page.grey, page.grey, page.grey))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=FONT_SIZE)
    for *ends, brightness, width in page.lines:
        draw.line(ends, fill=(brightness, brightness, brightness), width=width)
    ground = COLOURS[page.colour]
    right, bottom = page.left + SIGN[0], page.top + SIGN[1]
    draw.rectangle((page.left, page.top, right - 1, bottom - 1), fill=ground)
    ink = (0, 0, 0) if page.colour in BRIGHT else (255, 255, 255)
    draw.text(((page.left + right) / 2, (page.top + bottom) / 2), page.word, font=font, anchor="mm", fill=ink)
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

    def record(rng: random.Random, split: str, file: Path) -> dict[str, Any]:
        page, topics = random_page(rng), list(QUESTIONS) if split == "train" else READING
        draw_page(page).save(file.with_suffix(".png"))
        return {"image": f"{file.name}.png", "conversations": conversation(rng, page.truth, topics)}

    write_records(folder, "images", record, num_train=num_train, num_eval=num_eval, seed=seed)
