"""Equal prompts of a batch share one prefill, and give the tokens that they give without sharing."""

import pytest
import torch
from transformers import DynamicCache, GenerationMixin

from tests.support.families import FAMILIES, SPECIAL, family_inputs, family_model
from vtprune_train import PyramidDrop, pack, prune
from vtprune_train.models.forward import generate as generate_module
from vtprune_train.models.forward import padded
from vtprune_train.models.forward.calls import state_of
from vtprune_train.models.forward.shared_prefill import share_prefill

pytestmark = pytest.mark.skipif(
    not hasattr(GenerationMixin, "_expand_multimodal_outputs"),
    reason="transformers before 5.18 encodes images in the prefill",
)

HALF = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25))
CAT = [0, "what is shown here ? assistant :"]
TWO = ["a red", 1, "and", 2, "two ? assistant :"]
TEXT = ["what is a dog ? assistant :"]
GROUPED = [CAT, CAT, CAT, TWO, TWO, TWO, TEXT, TEXT]
MIXED = [TWO, CAT, TEXT, TWO, [1, *CAT[1:]], CAT]


class Prefills:
    """Rows and images of every prefill, and the switch that turns sharing off."""

    def __init__(self, monkeypatch):
        self.seen, self.patch = [], monkeypatch
        segments = padded._segments

        def spy(call, *args, **kwargs):
            images = len(call.images)
            made = segments(call, *args, **kwargs)
            self.seen.append((len(made), images))
            return made

        monkeypatch.setattr(padded, "_segments", spy)

    def both(self, model, inputs, **settings):
        """Tokens with sharing and without it, and the rows and images of the two prefills."""
        self.seen.clear()
        shared = tokens(model, inputs, **settings)
        with self.patch.context() as patch:
            patch.setattr(generate_module, "share_prefill", lambda *_: None)
            alone = tokens(model, inputs, **settings)
        return shared, alone, self.seen


@pytest.fixture
def prefills(monkeypatch):
    return Prefills(monkeypatch)


def tokens(model, inputs, **settings):
    torch.manual_seed(0)
    settings = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": list(range(len(SPECIAL))), **settings}
    with torch.no_grad():
        return model.generate(**inputs, **settings)


@pytest.mark.parametrize("rows", [GROUPED, MIXED], ids=["grouped", "mixed"])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_equal_rows_of_every_family(prefills, name, rows):
    model, inputs = prune(family_model(name), HALF), family_inputs(name, rows)
    num_distinct = len({str(row) for row in rows})
    for settings in ({}, {"do_sample": True, "temperature": 1.5}):
        shared, alone, seen = prefills.both(model, inputs, **settings)
        assert [rows for rows, _ in seen] == [num_distinct, len(rows)], settings
        assert seen[0][1] < seen[1][1]
        assert torch.equal(shared, alone)
        assert len({tuple(row.tolist()) for row in shared}) >= num_distinct
        if settings:
            assert not torch.equal(shared[rows.index(CAT)], shared[len(rows) - rows[::-1].index(CAT) - 1])


@pytest.mark.parametrize(
    "method",
    [
        None,
        "fastv",
        "random",
        "divprune",
        "prumerge",
        "pool",
        PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), positions="keep"),
        PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), multi_turn="keep_dense"),
    ],
    ids=str,
)
def test_methods(prefills, method):
    model = family_model("llava_next")
    model = pack(model) if method is None else prune(model, method)
    shared, alone, seen = prefills.both(model, family_inputs("llava_next", MIXED))
    assert [rows for rows, _ in seen] == [4, 6]
    assert torch.equal(shared, alone)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llava_next", "internvl", "qwen2_5_vl", "qwen3_5"])
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
    ],
    ids=["sampling", "beams", "sequences_of_beams", "beam_sampling"],
)
def test_several_sequences_of_a_prompt(prefills, name, settings, side):
    model, inputs = prune(family_model(name), HALF), family_inputs(name, [CAT, TWO, TWO], side)
    shared, alone, seen = prefills.both(model, inputs, **settings)
    sequences = max(settings.get("num_beams", 1), settings.get("num_return_sequences", 1))
    assert [rows for rows, _ in seen] == [2, 3 * sequences]
    assert torch.equal(shared, alone)
    assert len(shared) == 3 * settings.get("num_return_sequences", 1)


def test_the_returned_cache_holds_every_row():
    model, inputs = prune(family_model("llava_next"), HALF), family_inputs("llava_next", MIXED)
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert all(layer.keys.shape[0] == len(MIXED) for layer in output.past_key_values.layers)


def other_pixels(inputs):
    """Whole numbers, so that both rows have the same sum and only their values tell them apart."""
    pixels = inputs["pixel_values"].round()
    assert not torch.equal(pixels[1], pixels[1].flip(-1))
    return {**inputs, "pixel_values": torch.stack([pixels[0], pixels[1].flip(-1)])}


@pytest.mark.parametrize(
    ("change", "settings", "rows"),
    [
        (lambda inputs: inputs, {}, 1),
        (other_pixels, {}, 2),
        (lambda inputs: {**inputs, "attention_mask": None}, {}, 1),
        (lambda inputs: {**inputs, "image_sizes": inputs["image_sizes"].tolist()}, {}, 2),
        (lambda inputs: {**inputs, "past_key_values": DynamicCache()}, {}, 2),
        (lambda inputs: inputs, {"use_cache": False, "max_new_tokens": 1}, 2),
    ],
    ids=["equal", "other_pixels", "no_mask", "sizes_in_a_list", "cache_of_the_caller", "no_cache"],
)
def test_only_equal_tensors_are_shared(prefills, change, settings, rows):
    model, inputs = prune(family_model("llava_next"), HALF), change(family_inputs("llava_next", [CAT, CAT]))
    tokens(model, inputs, **settings)
    assert prefills.seen[0][0] == rows


@pytest.mark.parametrize(
    ("groups", "shares"),
    [([1, 1, 1, 1], True), ([2, 2], True), ([1, 1, 2], False), ([1, 2, 1], False), ([1, 1, 1], False)],
    ids=str,
)
def test_onevision_counts_the_images_that_belong_together(groups, shares):
    """Groups that differ between the rows, cross them or do not add up are not shared."""
    model, inputs = prune(family_model("llava_onevision"), HALF), family_inputs("llava_onevision", [TWO, TWO])
    inputs["batch_num_images"] = torch.tensor(groups)
    state = state_of(model)
    shared = share_prefill(model, state.family, state.image_token, model.generation_config, inputs)
    assert (shared is not None) == shares
    assert inputs["batch_num_images"].tolist() == (groups[: len(groups) // 2] if shares else groups)
    assert len(inputs["pixel_values"]) == (2 if shares else 4)


def test_a_masked_row_is_another_prompt(prefills):
    model, inputs = prune(family_model("llava_next"), HALF), family_inputs("llava_next", [CAT, CAT])
    inputs["attention_mask"][1, -2] = 0
    shared, alone, seen = prefills.both(model, inputs)
    assert [rows for rows, _ in seen] == [2, 2]
    assert torch.equal(shared, alone)


def test_a_failed_prefill_leaves_nothing_behind(monkeypatch):
    model, inputs = prune(family_model("llava_next"), HALF), family_inputs("llava_next", MIXED)
    expected = model(**inputs).logits
    with monkeypatch.context() as patch:
        patch.setattr(padded, "run_layers", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            tokens(model, inputs)
    assert torch.equal(model(**inputs).logits, expected)
