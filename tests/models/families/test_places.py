"""Where the visual tokens of every family lie: against what its own tower sees, and against the image's edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import GotOcr2ImageProcessorPil, Qwen2VLImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from tests.support.families import QWEN_SIZE, family_model, family_processor
from tests.support.helpers import PATCH, TILE
from vtprune_train.models.families import FAMILIES, family_of
from vtprune_train.models.families.base import Family, Lacks, required

MIXES = ("out_proj.", "attn.proj.", "projection_layer.")  # what brings attention's sums back into the tower's rows
SIZES = [(240, 400), (400, 240), (300, 300), (210, 290)]


def qwen_images(**more):
    return Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, size=QWEN_SIZE, temporal_patch_size=2, **more)


def tiles_of_internvl(**more):
    return GotOcr2ImageProcessorPil(size={"height": TILE, "width": TILE}, **more)


def padding():
    return LlavaImageProcessorPil(size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, do_pad=True)


CASES = {
    "llava_next": ("llava_next", lambda: family_processor("llava_next").image_processor),
    "llava, cropped": ("llava", lambda: family_processor("llava").image_processor),
    "llava, padded": ("llava", padding),
    "llava_onevision, whole": ("llava_onevision", lambda: family_processor("llava_onevision").image_processor),
    "llava_onevision, pooled": ("llava_onevision", lambda: family_processor("llava_onevision").image_processor),
    "qwen2_vl": ("qwen2_vl", qwen_images),
    "qwen2_5_vl": ("qwen2_5_vl", qwen_images),
    "qwen3_vl": ("qwen3_vl", qwen_images),
    "qwen3_5": ("qwen3_5", qwen_images),
    "llava_next_video": ("llava_next_video", lambda: family_processor("llava_next_video").image_processor),
    "internvl, tiles": ("internvl", lambda: tiles_of_internvl(crop_to_patches=True, max_patches=6)),
    "internvl, one tile": ("internvl", tiles_of_internvl),
}


class Case:
    """A family's tiny model whose patches do not see each other, and its image processor."""

    def __init__(self, name):
        family, image_processor = CASES[name]
        self.model, self.image_processor = family_model(family), image_processor()
        self.family, self.pooled = family_of(self.model), name.endswith("pooled")
        if name.endswith("whole"):
            self.model.config.vision_aspect_ratio = "anyres_max_9"
        with torch.no_grad():
            for parameter_name, parameter in self.model.named_parameters():
                if "language_model" not in parameter_name and any(part in parameter_name for part in MIXES):
                    parameter.zero_()

    def inputs(self, images, together=False):
        return dict(self.image_processor(images=[images] if together else images, return_tensors="pt"))

    def features(self, inputs):
        """[V, C] of each image."""
        inputs = {key: value for key, value in inputs.items() if key != "num_patches"}
        with torch.no_grad():
            made = self.model.model.get_image_features(**inputs, return_dict=True).pooler_output
        if self.family.run_is_one_image:
            return [made.flatten(0, 1)]
        return list(made)

    def places(self, inputs, images):
        sizes = [(image.height, image.width) for image in images]
        return self.family.places(self.model.config, self.image_processor, inputs, sizes)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return Case(request.param)


def grey(size):
    return Image.new("RGB", size[::-1], (90, 90, 90))


def marked(size, box):
    """A white square around the middle of ``box``, a third as large."""
    left, top, right, bottom = box
    width, height = (right - left) / 3, (bottom - top) / 3
    area = [round(left + width), round(top + height), round(right - width), round(bottom - height)]
    image = grey(size)
    image.paste((255, 255, 255), area)
    return image, np.array(area)


def meets(boxes, area):
    return (boxes[:, :2] < area[2:]).all(axis=1) & (boxes[:, 2:] > area[:2]).all(axis=1)


def check_marks(case, size, together=()):
    """A mark in a token's box changes that token alone, of its kind; of the others those that the mark reaches."""
    images = [grey(size), *together]
    before = case.features(inputs := case.inputs(images, bool(together)))[0]
    places = case.places(inputs, images)[0]
    assert len(places.kinds) == len(before)
    area = np.prod(places.boxes[:, 2:] - places.boxes[:, :2], axis=1)
    whole = np.flatnonzero((area > 0.9 * area[places.kinds == "grid"].max()) & (places.kinds != "newline"))
    for token in whole[:: max(1, len(whole) // 12)]:
        image, mark = marked(size, places.boxes[token])
        after = case.features(case.inputs([image, *together], bool(together)))[0]
        changed = (after != before).any(dim=1).numpy()
        assert changed[token]
        assert not changed[places.kinds == "newline"].any()
        same = places.kinds == places.kinds[token]
        if not case.pooled:
            assert np.flatnonzero(changed & same).tolist() == [token]
        box = places.boxes[token]
        reach = np.array([box[2] - box[0], box[3] - box[1]]) * (1 if case.pooled else 0.5)
        reached = meets(places.boxes, np.concatenate([mark[:2] - reach, mark[2:] + reach]))
        assert not (changed & ~reached).any(), "a token changes that lies elsewhere"
        for kind in {"base", "grid"} & set(places.kinds):
            assert (changed & (places.kinds == kind) & meets(places.boxes, mark)).any(), kind


@pytest.mark.parametrize("size", SIZES)
def test_a_mark_changes_the_token_that_lies_there(case, size):
    check_marks(case, size)


def test_a_shrunk_grid():
    """12 x 12 features of onevision's largest tiling are pooled to 8 x 8."""
    case = Case("llava_onevision, pooled")
    case.image_processor.image_grid_pinpoints = case.model.config.image_grid_pinpoints = [[84, 84]]
    places = case.places({}, [grey((300, 300))])[0]
    assert places.counts(np.arange(len(places.kinds))) == {"base": 16, "grid": 64, "newline": 8}
    check_marks(case, (300, 300))


@pytest.mark.parametrize("size", SIZES)
def test_several_images_of_onevision_are_a_tile_each(size):
    check_marks(Case("llava_onevision, whole"), size, together=[grey((50, 80))])


@pytest.mark.parametrize("size", [*SIZES, (31, 30), (1000, 100), (97, 1500)])
def test_boxes_lie_in_the_image_and_cover_it(case, size):
    inputs = {"image_sizes": torch.tensor([size])}
    [places] = case.places(inputs, [grey(size)])
    left, top, right, bottom = places.boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (right <= size[1]).all() and (bottom <= size[0]).all()
    assert (left <= right).all() and (top <= bottom).all()
    seen = np.zeros(size, dtype=int)
    for box in np.rint(places.boxes[places.kinds == ("base" if "base" in places.kinds else "grid")]).astype(int):
        seen[box[1] : box[3], box[0] : box[2]] += 1
    short = min(size)
    if case.family.title == "LLaVA-1.5" and not getattr(case.image_processor, "do_pad", None):
        rows, columns = ((side - short) // 2 for side in size)  # the middle is cut out
        cut = seen[rows + 1 : rows + short - 1, columns + 1 : columns + short - 1]
        assert (cut == 1).all() and abs(int((seen > 0).sum()) - short**2) <= 8 * short
    else:
        assert (seen == 1).all()
    geometry = case.family.images(case.model.config, case.image_processor, "test")
    assert geometry.tokens([size]) == [len(places.kinds)]


@pytest.mark.parametrize("size", SIZES)
def test_tokens_and_tiles_are_those_of_the_image_processor(case, size):
    geometry = case.family.images(case.model.config, case.image_processor, "test")
    inputs = case.inputs([grey(size)])
    assert geometry.tokens([size]) == [len(case.features(inputs)[0])]
    assert geometry.tiles([size]) == [inputs["pixel_values"].flatten(0, -4).shape[0] if inputs["pixel_values"].ndim > 2
                                      else len(inputs["pixel_values"])]  # fmt: skip
    assert all(geometry.tokens([size])[0] > 0 for size in geometry.examples())


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "internvl, tiles"])
def test_tower_flops_against_pytorchs_counter(name):
    case = Case(name)
    case.model.set_attn_implementation("eager")
    geometry = case.family.flops(case.model.config)
    inputs = case.inputs([grey((84, 56))])
    with FlopCounterMode(display=False) as counter:
        [features] = case.features(inputs)
    tiles = len(inputs["pixel_values"])
    assert geometry.tiles_of(len(features)) == tiles
    assert counter.get_total_flops() == pytest.approx(geometry.tower(tiles) + geometry.projector(tiles))


def test_every_family_of_the_list_shows_its_tokens():
    of_decoders_with_experts = {"qwen3_vl_moe", "qwen3_5_moe"}  # the towers are those of Qwen3-VL and Qwen3.5
    shown = {CASES[name][0] for name in CASES} | of_decoders_with_experts
    assert shown == {family.model_type for family in FAMILIES}


def test_a_family_without_a_part_says_why():
    family = Family("Eyeless", "eyeless", "EyelessForConditionalGeneration", ("llama",))
    assert isinstance(family.loop, Lacks)
    with pytest.raises(
        ValueError, match=r"cannot show the visual tokens of Eyeless: the positions of its .* are unknown"
    ):
        family.places(None, None, {}, [(1, 1)])
    with pytest.raises(ValueError, match="counting: the sizes of its tower are unknown"):
        required(family.flops, "counting")
