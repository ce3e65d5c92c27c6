"""Tiling and spatial_unpad, against transformers' own processor and model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextConfig, LlavaNextImageProcessorPil, LlavaNextProcessor

from tests.support.helpers import tiny_model, tiny_processor
from vtprune_train.data.images import image_size, load_image
from vtprune_train.models.families.layout import NEWLINE
from vtprune_train.models.families.llava_next import AnyRes
from vtprune_train.models.io.processors import build_processor

PHOTOS = Path(__file__).parents[4] / "shared" / "data" / "photos"
AWKWARD = [
    (1, 1),
    (1, 400),
    (400, 1),
    (335, 337),
    (336, 336),
    (672, 672),
    (1008, 336),
    (333, 1007),
    (2000, 3),
    (767, 1023),
]


def random_image(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", AWKWARD)
def test_counts_equal_the_processor_at_336(size):
    config = LlavaNextConfig()
    anyres = AnyRes.of(config)
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tiny_processor().tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    assert anyres.tokens([size])[0] == processor._get_num_multimodal_tokens([size])["num_image_tokens"][0]


@pytest.mark.parametrize("size", [(20, 30), (56, 57), (1, 90), (90, 1), (200, 199), (28, 84), (31, 29)])
def test_gather_equals_pack_image_features(size):
    model = tiny_model()
    anyres = AnyRes.of(model.config)
    tiles = anyres.num_tiles(size)
    features = torch.randn(tiles, anyres.patches_per_tile, 32)
    newline = torch.randn(32)
    packed, _ = model.model.pack_image_features([features], [size], "default", image_newline=newline)
    index = anyres.visual_index(size)
    table = torch.cat([features.flatten(0, 1), newline[None]])
    assert torch.equal(table[torch.from_numpy(np.where(index == NEWLINE, len(table) - 1, index))], packed[0])


@pytest.mark.parametrize("size", [(20, 30), (56, 57), (3, 90), (200, 199)])
def test_tokens_and_pixels_equal_the_processor(size):
    processor = tiny_processor()
    image = random_image(*size)
    theirs = processor(images=[image], text="<image>", return_tensors="pt")
    config = tiny_model().config
    own = build_processor(config, processor.tokenizer)
    anyres = AnyRes.of(config)
    assert int((theirs["input_ids"] == config.image_token_id).sum()) == anyres.tokens([size])[0]
    ours = own.image_processor(images=image, return_tensors="pt")["pixel_values"][0]
    assert ours.shape[0] == anyres.num_tiles(size)
    assert torch.equal(ours, theirs["pixel_values"][0])


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photographs are not part of a checkout")
@pytest.mark.parametrize(
    "name", ["astronaut.jpg", "dog.jpg", "extreme_ironing.jpg", "radar_chart.jpg", "waterview.jpg"]
)
def test_photographs(name):
    processor = tiny_processor()
    size = image_size(PHOTOS / name)
    image = load_image(PHOTOS / name, size)
    theirs = processor(images=[image], text="<image>", return_tensors="pt")
    config = tiny_model().config
    assert tuple(theirs["image_sizes"][0].tolist()) == size
    assert int((theirs["input_ids"] == config.image_token_id).sum()) == AnyRes.of(config).tokens([size])[0]
    ours = build_processor(config, processor.tokenizer).image_processor(images=image, return_tensors="pt")
    assert torch.equal(ours["pixel_values"][0], theirs["pixel_values"][0])


def test_class_token_strategy_and_odd_pinpoints_are_refused():
    config = LlavaNextConfig(vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match="'full' is not supported"):
        AnyRes.of(config)
    config = LlavaNextConfig(image_grid_pinpoints=[[336, 500]])
    with pytest.raises(ValueError, match=r"\[\[336, 500\]\] are not multiples"):
        AnyRes.of(config)
