"""The data set of the quickstart: drawn images and questions about them, written to disk in the LLaVA form."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from vtprune_train.files.disk import replace_synced

COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 210, 40),
    "purple": (140, 50, 160),
    "orange": (245, 130, 30),
}
PLACES = {"top left": (0.3, 0.3), "top right": (0.7, 0.3), "bottom left": (0.3, 0.7), "bottom right": (0.7, 0.7)}
CANVASES = ((56, 56), (112, 56), (56, 112), (112, 112), (100, 90), (168, 56), (56, 168), (140, 60), (70, 150))

Box = tuple[float, float, float, float]


def _ring(draw: ImageDraw.ImageDraw, box: Box, colour: tuple[int, int, int]) -> None:
    draw.ellipse(box, outline=colour, width=round((box[2] - box[0]) * 0.22))


def _bar(draw: ImageDraw.ImageDraw, box: Box, colour: tuple[int, int, int]) -> None:
    left, top, right, bottom = box
    inset = (bottom - top) * 0.36
    draw.rectangle((left, top + inset, right, bottom - inset), fill=colour)


SHAPES: dict[str, Callable[[ImageDraw.ImageDraw, Box, tuple[int, int, int]], None]] = {
    "square": lambda draw, box, colour: draw.rectangle(box, fill=colour),
    "ring": _ring,
    "bar": _bar,
}
QUESTIONS = {
    "colour": ("What colour is it?", "Which colour does it have?"),
    "shape": ("What shape is it?", "Which shape do you see?"),
    "place": ("Where is it?", "In which corner is it?"),
}


def draw_image(rng: random.Random) -> tuple[Image.Image, dict[str, str]]:
    """An image with one shape on a gray background, and its color, shape and place."""
    width, height = rng.choice(CANVASES)
    width, height = round(width * rng.uniform(0.9, 1.1)), round(height * rng.uniform(0.9, 1.1))
    truth = {"colour": rng.choice(list(COLOURS)), "shape": rng.choice(list(SHAPES)), "place": rng.choice(list(PLACES))}
    grey = rng.randint(100, 135)
    image = Image.new("RGB", (width, height), (grey, grey, grey))
    x, y = PLACES[truth["place"]]
    radius = min(width, height) * rng.uniform(0.25, 0.3)
    x, y = width * (x + rng.uniform(-0.03, 0.03)), height * (y + rng.uniform(-0.03, 0.03))
    SHAPES[truth["shape"]](
        ImageDraw.Draw(image), (x - radius, y - radius, x + radius, y + radius), COLOURS[truth["colour"]]
    )
    return image, truth


def _conversation(rng: random.Random, truth: dict[str, str]) -> list[dict[str, str]]:
    topics = rng.sample(list(QUESTIONS), k=rng.randint(1, len(QUESTIONS)))
    turns = []
    for position, topic in enumerate(topics):
        question = rng.choice(QUESTIONS[topic])
        turns.append({"from": "human", "value": question if position else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": truth[topic]})
    return turns


def write_dataset(folder: Path, *, num_train: int, num_eval: int, seed: int) -> None:
    """Write ``train.json``, ``eval.json`` and ``images/*.png``, unless the folder already has the same data set."""

    def record(rng: random.Random, split: str, file: Path) -> dict[str, Any]:
        image, truth = draw_image(rng)
        image.save(file.with_suffix(".png"))
        return {"image": f"{file.name}.png", "conversations": _conversation(rng, truth)}

    write_records(folder, "images", record, num_train=num_train, num_eval=num_eval, seed=seed)


def write_records(
    folder: Path,
    media: str,
    record: Callable[[random.Random, str, Path], dict[str, Any]],
    *,
    num_train: int,
    num_eval: int,
    seed: int,
) -> None:
    """Write the records of a synthetic data set, unless the folder already has the same data set.

    Args:
        folder: folder of the data set.
        media: its subfolder for images or videos.
        record: writes the image or video of a record and returns the record without its id, from the random numbers to
            use, the split (``train`` or ``eval``), and the path of the file without its suffix.
        num_train, num_eval: numbers of records.
        seed: of all random numbers.
    """
    stamp = folder / "made.json"
    made: dict[str, Any] = {"num_train": num_train, "num_eval": num_eval, "seed": seed, "version": 1}
    if stamp.is_file() and stamp.read_text(errors="replace") == json.dumps(made):
        return
    (folder / media).mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for split, count in (("train", num_train), ("eval", num_eval)):
        records = [
            {"id": f"{split}-{number}", **record(rng, split, folder / media / f"{split}-{number:05d}")}
            for number in range(count)
        ]
        (folder / f"{split}.json").write_text(json.dumps(records, indent=0))
    replace_synced(stamp, json.dumps(made).encode())
