"""Tiny checkpoints on disk: what the tests of the command line answer with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from tests.support.families import SPECIAL, family_model
from tests.support.helpers import tiny_model, tiny_processor
from vtprune_train import PyramidDrop, prune
from vtprune_train.config.data import DataConfig
from vtprune_train.training.checkpoint.manifest import files_in, sync_and_hash, write_manifest

HALF = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25))
TEMPLATE = {"user": "user : {text}", "assistant": " assistant :", "answer": " {text}{eos}", "separator": "\n"}
SIZES = [(40, 70), (90, 30), (50, 50), (84, 84), (33, 61)]


def talkative(name: str = "llava_next") -> Any:
    """A model whose answers are words, with and without a picture, and end now and then."""
    model = tiny_model().eval() if name == "llava_next" else family_model(name)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 3
    model.generation_config.suppress_tokens = [token for token in range(64) if token < len(SPECIAL) and token != 2]
    return model


def save_folder(folder: Path, method: PyramidDrop | None = HALF, model: Any = None) -> Path:
    """A Hugging Face folder with a processor; without pruning settings for ``None``."""
    model = talkative() if model is None else model
    if method is not None:
        prune(model, method)
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def save_run(folder: Path, method: PyramidDrop = HALF, **data: Any) -> Path:
    """A run's folder with one checkpoint, trained by ``TEMPLATE``."""
    checkpoint = folder / "checkpoints" / "step_00000008"
    save_folder(checkpoint / "hf", method)
    settings = DataConfig(**{"template": TEMPLATE, "system": "", **data})
    (checkpoint / "config.yaml").write_text(yaml.safe_dump({"data": settings.model_dump(mode="json")}))
    finish(checkpoint)
    return folder


def finish(checkpoint: Path) -> None:
    """Make a folder what the loop takes for a whole checkpoint, the run's newest."""
    (checkpoint / "trainer.json").write_text("{}")
    write_manifest(checkpoint, {name: sync_and_hash(checkpoint / name) for name in files_in(checkpoint)})
    (checkpoint.parent / "latest").write_text(checkpoint.name)


def save_images(folder: Path, count: int = 5) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    paths = []
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        image = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        paths.append(folder / f"{number}.png")
        image.save(paths[-1])
    return paths


def save_data(folder: Path, records: int = 10) -> Path:
    """``val.json``: one picture, two over two turns, and text alone, in turn; and ``images/``."""
    save_images(folder / "images")
    made = []
    for number in range(records):
        first = f"<image>\nwhat is shown {'here ' * (number % 4)}?"
        turns = [first, "yes", "<image> and the dog on the left ?", "no"] if number % 3 == 1 else [first, "two"]
        if number % 3 == 2:
            turns = ["what is a cat ?", "red"]
        names = [f"{(number + index) % 5}.png" for index in range("".join(turns).count("<image>"))]
        said = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(turns)]
        made.append({"id": f"sample{number}", "conversations": said, **({"image": names} if names else {})})
    path = folder / "val.json"
    path.write_text(json.dumps(made))
    return path


def same_state(one: Any, two: Any, dtype: torch.dtype) -> None:
    """Both models hold the same weights, the first cast to ``dtype``."""
    ours, theirs = one.state_dict(), two.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value.to(dtype), theirs[name]), name
