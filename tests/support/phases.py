"""Samples and a collator for steps of any phase."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.support.helpers import tiny_image_processor, tiny_model, tiny_tokenizer
from vtprune_train import PyramidDrop
from vtprune_train.core.flops import DecoderGeometry, TrainingCost
from vtprune_train.data.chat import ChatEncoder, get_template
from vtprune_train.data.load.collate import Collator, LoadedSample
from vtprune_train.data.records import normalize
from vtprune_train.models.families.layout import SampleImages
from vtprune_train.models.families.llava_next import AnyRes
from vtprune_train.models.families.towers import tile_tower

METHOD = PyramidDrop(layers=(2, 3, 5), keep=(0.5, 0.3, 0.1))
LAYERS = 6
SIZES = [[(40, 70)], [], [(90, 30), (50, 50)], [(30, 31)]]


@pytest.fixture(scope="module", name="parts")
def make_parts():
    model = tiny_model(num_layers=LAYERS)
    encoder = ChatEncoder(tiny_tokenizer(), get_template("vicuna_v1"), 4)
    layout, processor = AnyRes.of(model.config), tiny_image_processor()
    rng = np.random.default_rng(0)
    loaded = []
    for number, sizes in enumerate(SIZES):
        asked = {"from": "human", "value": "<image>" * len(sizes) + " what is shown"}
        again = {"from": "human", "value": "two ?"}
        said = [asked, {"from": "gpt", "value": "a cat"}, again, {"from": "gpt", "value": "no"}]
        record = normalize({"image": ["x.png"] * len(sizes), "conversations": said}, "x")
        images = [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]
        pictures = SampleImages(sizes, layout.pixels(processor, images))
        loaded.append(LoadedSample(str(number), encoder.encode(record.turns), pictures))
    cost = TrainingCost(DecoderGeometry.of(model.config.text_config), tile_tower(model.config), True, True)

    def collator(phases=None, method=METHOD):
        return Collator(None, encoder, layout, processor, method, cost, phases)

    return SimpleNamespace(loaded=loaded, collator=collator, cost=cost, layout=layout)
