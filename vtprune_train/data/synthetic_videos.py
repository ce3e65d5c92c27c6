"""The data set of ``vtprune quickstart --video``: short synthetic videos, and questions that no single frame answers.

A shape moves, two shapes appear one after the other, or a shape changes its color. Each video is as likely as the same
video in reverse, which has a different answer, so the frames without their order do not determine the answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vtprune_train.data.synthetic import COLOURS, SHAPES, write_records

FRAMES, SIDE, FPS = 6, 56, 3  # of each video; side in pixels
RADIUS = (8.0, 10.0)  # of a shape, in pixels
SPEED = (4.0, 7.0)  # pixels per frame
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


@dataclass(frozen=True)
class Drawn:
    """A shape in one frame; ``x``, ``y`` (its center) and ``radius`` are in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A video, described by the shape in each frame (``None``: no shape), and a question about it.

    Args:
        frames: one entry for each frame.
        topic: the kind of question, a key of :data:`TOPICS`.
        question, answer: about ``frames``.
        reversed_answer: the answer to the same question about the frames in reverse order.
    """

    frames: tuple[Drawn | None, ...]
    topic: str
    question: str
    answer: str
    reversed_answer: str


def draw_scene(rng: random.Random) -> Scene:
    """A random scene of a random topic."""
    topic = rng.choice(list(TOPICS))
    return TOPICS[topic](rng)


def _motion(rng: random.Random) -> Scene:
    """A shape that moves at a constant speed in one direction."""
    radius = rng.uniform(*RADIUS)
    travel = rng.uniform(*SPEED) * (FRAMES - 1)
    begin, across = rng.uniform(radius, SIDE - radius - travel), rng.uniform(radius, SIDE - radius)
    along = [begin + travel * step / (FRAMES - 1) for step in range(FRAMES)]
    answer = rng.choice(list(DIRECTIONS))
    horizontal, sign = DIRECTIONS[answer][0] != 0, sum(DIRECTIONS[answer])
    shape, color = rng.choice(list(SHAPES)), rng.choice(list(COLOURS))
    places = [(place, across) if horizontal else (across, place) for place in along[::sign]]
    question = rng.choice(("Which way does it move?", "In which direction does it go?"))
    frames = tuple(Drawn(shape, color, x, y, radius) for x, y in places)
    return Scene(frames, "motion", question, answer, OPPOSITE[answer])


def _order(rng: random.Random) -> Scene:
    """Two shapes that appear and disappear one after the other."""
    colors = rng.sample(list(COLOURS), k=2)
    shapes = [_still(rng, color) for color in colors]
    named = rng.sample(colors, k=2)
    question = f"Which comes first, the {named[0]} or the {named[1]} shape?"
    return Scene(_in_turn(rng, shapes, rng.randint(0, 1)), "order", question, *colors)


def _change(rng: random.Random) -> Scene:
    """A shape that changes its color."""
    colors = rng.sample(list(COLOURS), k=2)
    before = _still(rng, colors[0])
    frames = _in_turn(rng, [before, replace(before, color=colors[1])], 0)
    if rng.random() < 0.5:
        return Scene(frames, "change", "Which color does it have at first?", *colors)
    return Scene(frames, "change", "Which color does it have in the end?", *reversed(colors))


def _still(rng: random.Random, color: str) -> Drawn:
    radius = rng.uniform(*RADIUS)
    x, y = (rng.uniform(radius, SIDE - radius) for _ in range(2))
    return Drawn(rng.choice(list(SHAPES)), color, x, y, radius)


def _in_turn(rng: random.Random, shapes: list[Drawn], pause: int) -> tuple[Drawn | None, ...]:
    """Show two shapes one after the other for 1 or 2 frames each, ``pause`` frames apart, at a random time."""
    frames: list[Drawn | None] = [shapes[0]] * rng.randint(1, 2) + [None] * pause + [shapes[1]] * rng.randint(1, 2)
    before = rng.randint(0, FRAMES - len(frames))
    return (*[None] * before, *frames, *[None] * (FRAMES - before - len(frames)))


TOPICS: dict[str, Callable[[random.Random], Scene]] = {"motion": _motion, "order": _order, "change": _change}


def draw_frames(scene: Scene, grey: int) -> np.ndarray:
    """[FRAMES, SIDE, SIDE, 3] uint8, on a background of this brightness."""
    frames = []
    for drawn in scene.frames:
        image = Image.new("RGB", (SIDE, SIDE), (grey, grey, grey))
        if drawn is not None:
            x, y, radius = drawn.x, drawn.y, drawn.radius
            box = (x - radius, y - radius, x + radius, y + radius)
            SHAPES[drawn.shape](ImageDraw.Draw(image), box, COLOURS[drawn.color])
        frames.append(np.asarray(image))
    return np.stack(frames)


def write_video(path: Path, frames: np.ndarray) -> None:
    """Write [T, height, width, 3] uint8 frames as H.264."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "12", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def write_dataset(folder: Path, *, num_train: int, num_eval: int, seed: int) -> None:
    """Write ``train.json``, ``eval.json`` and ``videos/*.mp4``, unless the folder already has the same data set."""

    def record(rng: random.Random, split: str, file: Path) -> dict[str, Any]:
        scene = draw_scene(rng)
        write_video(file.with_suffix(".mp4"), draw_frames(scene, rng.randint(100, 135)))
        turns = [("human", f"<video>\n{scene.question}"), ("gpt", scene.answer)]
        conversation = [{"from": role, "value": text} for role, text in turns]
        return {"video": f"{file.name}.mp4", "conversations": conversation}

    write_records(folder, "videos", record, num_train=num_train, num_eval=num_eval, seed=seed)
