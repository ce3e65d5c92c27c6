"""Small data sets, their index and their collator."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from tests.support.helpers import tiny_image_processor, tiny_model, tiny_tokenizer
from vtprune_train.core.flops import DecoderGeometry, TrainingCost
from vtprune_train.data.chat import ChatEncoder, get_template
from vtprune_train.data.index import Source, build_index
from vtprune_train.data.load.collate import Collator
from vtprune_train.models.families.llava_next import AnyRes
from vtprune_train.models.families.towers import tile_tower

CONFIG = tiny_model().config


def say(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def write_image(path, size=(40, 60), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def index_of(folder, records, name="train.json", take="all", **settings):
    path = folder / name
    if records is not None:
        path.write_text(json.dumps(records))
    encoder = ChatEncoder(tiny_tokenizer(), get_template("vicuna_v1"), 4)
    options = {"max_length": 500, "too_long": "error", "max_bad": 0, "seed": 0, "workers": 1, **settings}
    sources = [Source(path, folder / "images", take)]
    return build_index(sources, encoder, AnyRes.of(CONFIG), cache_dir=folder / "cache", **options), encoder


def collator(index, encoder, method=None):
    cost = TrainingCost(DecoderGeometry.of(CONFIG.text_config), tile_tower(CONFIG), True, True)
    return Collator(index, encoder, AnyRes.of(CONFIG), tiny_image_processor(), method, cost)


def build(sources, folder, **settings):
    encoder = ChatEncoder(tiny_tokenizer(), get_template("vicuna_v1"), 4)
    options = {"max_length": 500, "too_long": "error", "max_bad": 0, "seed": 0, "workers": 1, **settings}
    return build_index(sources, encoder, AnyRes.of(CONFIG), cache_dir=folder / "cache", **options), encoder


def image_bytes(folder, number, size=(40, 60)):
    path = folder / "images" / f"{number}.png"
    write_image(path, size, seed=number)
    return path.read_bytes()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
