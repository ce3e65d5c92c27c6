"""The project's own loop on families beside LLaVA-NeXT: packed equals transformers' padded model; real runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GotOcr2ImageProcessorPil,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionProcessor,
    Qwen2VLImageProcessorPil,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tests.support.families import family_model, tokenizer
from tests.support.family_runs import (
    NAMES,
    RECORDS,
    SIZES,
    TEXT_ONLY,
    FamilyRuns,
    Setup,
    image_processor,
    padded_inputs,
    save_checkpoint,
)
from tests.support.helpers import Reads, tiny_tokenizer
from tests.support.reference import pyramiddrop
from tests.support.runner import TINY, assert_equal_checkpoints
from vtprune_train import PyramidDrop, prune
from vtprune_train.config.model import ModelConfig
from vtprune_train.core.stream import IGNORE
from vtprune_train.models.families import qwen2_5_vl, trained_family
from vtprune_train.models.families.towers import tile_tower
from vtprune_train.models.io.build import build_model, load_model_config, parts_of, set_trainable
from vtprune_train.models.io.processors import build_image_processor, build_processor
from vtprune_train.models.io.tokenizer import load_tokenizer
from vtprune_train.viz.evaluation_images import _question, draw_kept
from vtprune_train.viz.show import look

pytestmark = pytest.mark.slow

DROP = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), positions="keep")


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs, within=2e-4):
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        scale = theirs[name].abs().max().clamp(min=1.0)
        assert (grad - theirs[name]).abs().max() <= within * scale, name


@pytest.fixture(scope="module", params=NAMES)
def setup(request, tmp_path_factory):
    return Setup(request.param, tmp_path_factory.mktemp(request.param))


def test_nothing_dropped_is_transformers_own_model(setup):
    """Token ids, loss and gradients of every part; several pictures, no picture, several turns."""
    parts = setup.parts()
    batch = setup.collator(parts, None)(range(len(RECORDS)))
    assert not batch.unreadable
    inputs = padded_inputs(setup, parts.model)
    real = inputs["attention_mask"].bool()
    assert torch.equal(inputs["input_ids"][real], batch.input_ids)
    stream_labels = torch.full_like(batch.input_ids, IGNORE)
    stream_labels[batch.plan.predict_rows + 1] = batch.targets
    labels = torch.full_like(inputs["input_ids"], IGNORE)
    labels[real] = stream_labels
    loss = parts.model(**inputs, labels=labels).loss * len(batch.targets)
    loss.backward()
    expected = gradients(parts.model)
    parts.model.zero_grad(set_to_none=True)
    output = prune(parts.model, None)(batch)
    output.loss_sum.backward()
    assert abs(output.loss_sum - loss) < 1e-4 * loss
    assert_same_gradients(gradients(parts.model), expected)
    trained = {name for part in ("projector", "vision_tower") for name, _ in parts_of(parts.model)[part]}
    assert trained <= expected.keys()


def test_the_packed_loop_reads_nothing_from_the_device(setup):
    """Forward, recomputation and backward on meta tensors, which hold no data: a read of one is an error."""
    parts = setup.parts()
    batch = setup.collator(parts, DROP)(range(len(RECORDS)))
    parts.model.train().gradient_checkpointing_enable({"use_reentrant": False})
    model = prune(parts.model, DROP).to("meta")
    with Reads() as reads:
        model(batch.to("meta")).loss_sum.backward()
    assert reads.seen == []
    assert all(p.grad is not None for p in model.model.language_model.layers.parameters())


@pytest.mark.parametrize("rank_with", ["next_layer", "this_layer"])
def test_packed_with_dropping_equals_one_by_one(setup, rank_with):
    method = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), rank_with=rank_with, positions="keep")
    parts = setup.parts()
    collate = setup.collator(parts, method)
    model = prune(parts.model, method).train()
    packed = model(collate(range(len(RECORDS))))
    packed.loss_sum.backward()
    together = gradients(model)
    model.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for sample in range(len(RECORDS)):
        alone = model(collate([sample])).loss_sum
        alone.backward()
        total += alone.detach()
    assert abs(packed.loss_sum - total) < 1e-4 * total
    assert_same_gradients(together, gradients(model))


def position_of_each_frequency(rope, positions):
    """[L, D / 2] from (time, height, width) positions [3, L]: in three blocks, or Qwen3-VL's alternating ones."""
    sections = rope["mrope_section"]
    part = [number for number, size in enumerate(sections) for _ in range(size)]
    if rope.get("mrope_interleaved"):
        part = [next((p for p in (1, 2) if i % 3 == p and i < 3 * sections[p]), 0) for i in range(sum(sections))]
    return positions[part].T


def seen_by_the_decoder(model, inputs):
    """What transformers passes to the decoder: embeddings, positions and the features added after the first layers."""
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    visual = inputs["input_ids"] == model.config.image_token_id
    features = seen.get("deepstack_visual_embeds") or ()
    spread = [torch.zeros_like(seen["inputs_embeds"]).masked_scatter(visual[..., None], f) for f in features]
    return seen["inputs_embeds"], seen.get("position_ids"), spread


def test_dropping_equals_a_slow_loop_over_transformers_inputs(setup):
    """Loss and gradients of all parts, sample by sample, in float64: rounding must not decide which token stays."""
    parts = setup.parts()
    collate = setup.collator(parts, DROP)
    model = parts.model.double()
    text_model, inputs = model.model.language_model, padded_inputs(setup, model)
    real = inputs["attention_mask"].bool()
    embeds, positions, deepstack = seen_by_the_decoder(model, inputs)
    rope, total = text_model.config.rope_parameters, 0.0
    for row in range(len(RECORDS)):
        batch, at = collate([row]), real[row]
        [segment] = batch.plan.outline.segments
        start = position_of_each_frequency(rope, positions[-3:, row, at]) if "mrope_section" in rope else None
        hidden, alive = pyramiddrop(
            text_model, embeds[row, at], [span.offsets() for span in segment.spans],
            list(segment.query_offsets), list(DROP.layers), list(DROP.keep), positions="keep", start=start,
            deepstack=[features[row, at] for features in deepstack],
        )  # fmt: skip
        rows = [alive.index(offset - 1) for offset in segment.supervised_offsets]
        logits = model.lm_head(text_model.norm(hidden[rows]))
        total = total + torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum")
    total.backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    output = prune(model, DROP)(collate(range(len(RECORDS))))
    output.loss_sum.backward()
    assert abs(output.loss_sum - total) < 1e-4 * total
    # transformers' linear attention computes in float32
    assert_same_gradients(gradients(model), expected, 1e-3 if setup.name == "qwen3_5" else 2e-4)


def test_the_index_tells_what_the_batch_holds(setup):
    parts = setup.parts()
    collate = setup.collator(parts, DROP)
    for sample, (_, images) in enumerate(RECORDS):
        batch = collate([sample])
        assert batch.plan.stages[0].num_tokens == collate.index.lengths([sample]).tokens[0] == len(batch.input_ids)
        assert (len(batch.pixel_values) if images else 0) == collate.index.lengths([sample]).tiles[0]
        assert len(batch.visual_rows) == len(batch.visual_index)
        assert (batch.input_ids[batch.visual_rows] == parts.model.config.image_token_id).all()
        assert int((batch.input_ids == parts.model.config.image_token_id).sum()) == len(batch.visual_rows)
        assert not images or 0 < batch.costs["flops"] < batch.costs["flops_dense"], "nothing was saved"


def test_a_batch_without_images_reaches_every_trained_part_with_zero_gradients(setup):
    """So that ranks with and without a picture stay together."""
    parts = setup.parts()
    collate = setup.collator(parts, DROP)
    model = prune(parts.model, DROP).train()
    model(collate(range(len(RECORDS)))).loss_sum.backward()
    seen = gradients(model)
    for samples in ([TEXT_ONLY], []):
        model.zero_grad(set_to_none=True)
        model(collate(samples)).loss_sum.backward()
        blind = gradients(model)
        assert blind.keys() == seen.keys()
        vision = [name for part in ("projector", "vision_tower") for name, _ in parts_of(model)[part]]
        assert vision and all(not blind[name].any() for name in vision)


def test_parts_that_are_frozen_get_no_gradient(setup):
    setup_parts = setup.parts()
    model = setup_parts.model
    set_trainable(model, {"projector": 1e-3})
    model = prune(model, DROP).train()
    model(setup.collator(setup_parts, DROP)(range(len(RECORDS)))).loss_sum.backward()
    assert gradients(model).keys() == {name for name, _ in parts_of(model)["projector"]}


def test_every_parameter_is_in_one_part_and_unused_ones_get_no_gradient(setup):
    parts = setup.parts()
    named = parts_of(parts.model)
    assert sum(map(len, named.values())) == len(list(parts.model.parameters()))
    assert named["projector"] and named["vision_tower"] and named["language_model"]
    parts.model.requires_grad_(True)
    prune(parts.model, None)(setup.collator(parts, None)(range(len(RECORDS)))).loss_sum.backward()
    without = {name for name, p in parts.model.named_parameters() if p.grad is None}
    assert without == {name for name, _ in named["unused"]}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("qwen")])
def test_three_part_positions_equal_transformers(name, tmp_path):
    setup = Setup(name, tmp_path)
    parts = setup.parts()
    batch = setup.collator(parts, None)(range(len(RECORDS)))
    inputs = padded_inputs(setup, parts.model)
    keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    expected, _ = parts.model.model.get_rope_index(**{key: inputs[key] for key in keys})
    assert torch.equal(batch.positions, expected[:, inputs["attention_mask"].bool()])


SIDES = st.tuples(st.integers(8, 200), st.integers(8, 200))


@settings(max_examples=25, deadline=None)
@given(st.lists(SIDES, min_size=1, max_size=3), st.sampled_from(NAMES))
def test_counts_equal_the_features_that_the_model_makes(sizes, name):
    model = family_model(name)
    _, loop = trained_family(name, "test")
    processor = image_processor(name)
    layout = loop.layout(model.config, processor)
    images = [Image.new("RGB", (width, height)) for height, width in sizes]
    pixels = layout.pixels(processor, images)
    assert [len(own) for own in pixels] == layout.tiles(sizes)
    made = processor([images] if name == "llava_onevision" else images, return_tensors="pt")
    tiles = made.pop("num_patches").tolist() if name == "internvl" else [1] * len(sizes)  # one entry for each tile
    with torch.no_grad():
        features = iter(model.model.get_image_features(**made).pooler_output)
    assert [sum(len(next(features)) for _ in range(count)) for count in tiles] == layout.tokens(sizes)
    assert not list(features)


@settings(max_examples=200, deadline=None)
@given(st.tuples(st.integers(1, 5000), st.integers(1, 5000)))
def test_onevision_counts_equal_the_processor_at_384(size):
    config = LlavaOnevisionConfig()
    layout = trained_family("llava_onevision", "test")[1].layout(config, None)
    processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    processor.image_processor = image_processor("llava_onevision").__class__()
    processor.num_image_tokens, processor.vision_aspect_ratio = 27 * 27, config.vision_aspect_ratio
    assert layout.tokens([size]) == [processor._get_number_of_features(*size, 384, 384)]


@settings(max_examples=200, deadline=None)
@given(st.tuples(st.integers(28, 5000), st.integers(28, 5000)))
def test_qwen_counts_equal_the_processor(size):
    config = family_model("qwen2_5_vl").config
    processor = Qwen2VLImageProcessorPil(patch_size=7, max_pixels=10**6)
    layout = trained_family("qwen2_5_vl", "test")[1].layout(config, processor)
    assert layout.tokens([size]) == [processor.get_number_of_image_patches(*size) // 4]


def test_llava_1_5_from_parts_and_from_sizes(tmp_path):
    from tests.support.model_parts import built, from_parts, save_parts

    _, tower = save_parts(tmp_path)
    settings = from_parts(tmp_path).model_copy(update={"image_grid_pinpoints": None})
    model, words = built(settings, tmp_path)
    assert type(model) is LlavaForConditionalGeneration
    for name, value in tower.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], value), name
    sizes = {**TINY["model"]["config"], "model_type": "llava"}
    del sizes["image_grid_pinpoints"]
    scratch = ModelConfig(config=sizes, tokenizer=str(tmp_path / "language"), dtype="float32")
    assert type(built(scratch, tmp_path)[0]) is LlavaForConditionalGeneration
    model.save_pretrained(tmp_path / "stage1")
    again = build_model(settings.model_copy(update={"projector": str(tmp_path / "stage1")}), words)
    projector = again.model.multi_modal_projector.linear_1.weight
    assert torch.equal(projector, model.model.multi_modal_projector.linear_1.weight)


def test_internvl_tiles_images_as_its_processor_does(tmp_path):
    """Whatever the file of the image processor says."""
    folder, image = save_checkpoint("internvl", tmp_path), Image.new("RGB", (84, 28))
    GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, max_patches=4).save_pretrained(folder)
    config = family_model("internvl").config
    processor = build_processor(config, AutoTokenizer.from_pretrained(folder), str(folder))
    layout = trained_family("internvl", "test")[1].layout(config, processor.image_processor)
    [pixels] = layout.pixels(processor.image_processor, [image])
    processor.image_processor.crop_to_patches = False
    made = processor(images=[image], text="<IMG_CONTEXT>", return_tensors="pt")
    assert len(pixels) == 4 and torch.equal(pixels, made["pixel_values"])
    assert int((made["input_ids"] == config.image_token_id).sum()) == layout.tokens([(28, 84)])[0]


def test_a_whole_processor_is_saved_where_it_can_be_made(tmp_path):
    config = family_model("llava").config
    build_processor(config, tokenizer()).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)).__name__ == "LlavaProcessor"


def test_settings_that_do_not_fit_the_family_are_refused(tmp_path):
    for name in ("llava_onevision", "qwen2_5_vl"):
        with pytest.raises(ValueError, match=f"'{name}': this family can only be trained from a checkpoint"):
            load_model_config(ModelConfig(config={"model_type": name, "text_config": {"vocab_size": 64}}))
    with pytest.raises(ValueError, match="holds a llama, which the training loop does not support; it supp"):
        LlamaConfig().save_pretrained(tmp_path)
        load_model_config(ModelConfig(path=str(tmp_path)))
    with pytest.raises(ValueError, match="max_pixels=5000 is for models that support images of any size"):
        build_image_processor(family_model("llava").config, None, 5000)
    config = family_model("qwen2_5_vl").config
    with pytest.raises(ValueError, match="max_pixels=9 is below the smallest size, 3136"):
        build_image_processor(config, None, 9)
    other = Qwen2VLImageProcessorPil(patch_size=14)
    with pytest.raises(ValueError, match=r"patch_size=14 is not the model's vision_config\.patch_size=7"):
        trained_family("qwen2_5_vl", "test")[1].layout(config, other)
    words = ModelConfig(path=str(save_checkpoint("qwen2_5_vl", tmp_path / "q")), tokenizer=str(tmp_path / "words"))
    tiny_tokenizer().save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match=r"has no <\|image_pad\|>, the image token of a qwen2_5_vl"):
        load_tokenizer(words, list, tmp_path / "none")


def test_evaluation_images(setup):
    """The first samples that have pictures, one panel an image and stage; the text-only one is left out."""
    parts = setup.parts()
    collate = setup.collator(parts, DROP)
    model = prune(parts.model, DROP)
    drawn = draw_kept(model, collate, images=4, device=torch.device("cpu"))
    assert [pixels.dtype for pixels in drawn] == [np.uint8] * 2
    one, three = (pixels.shape for pixels in drawn)
    assert three[0] > 1.5 * one[0] and three[1] == one[1]
    shown = _question(collate, 2)
    assert shown.text == "a  dog ?" and [image.size for image in shown.images] == [(30, 90), (50, 50), (84, 84)]
    kept = look(model, collate.image_processor, shown.inputs, shown.images)
    counts = collate.layout.tokens([SIZES[number] for number in (1, 2, 3)])
    assert [[len(tokens) for tokens in image.kept] for image in kept] == [[n, n // 2, n // 4] for n in counts]


def test_large_images_are_shrunk_to_max_pixels():
    config = family_model("qwen2_5_vl").config
    layouts = [
        trained_family("qwen2_5_vl", "test")[1].layout(config, build_image_processor(config, None, limit))
        for limit in (None, 28 * 28 * 16)
    ]
    assert layouts[0].tokens([(200, 300)])[0] > 64 >= layouts[1].tokens([(200, 300)])[0] > 48


def test_tower_flops_against_pytorchs_counter():
    """Full attention everywhere, so that windows do not matter."""
    model = family_model("qwen2_5_vl")
    model.set_attn_implementation("eager")
    model.model.visual.fullatt_block_indexes = [0, 1]
    model.config.vision_config.fullatt_block_indexes = [0, 1]
    geometry = qwen2_5_vl.FAMILY.flops(model.config)
    grid = torch.tensor([[1, 6, 8]])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.visual(torch.randn(48, 3 * 2 * 7 * 7), grid)
    assert counter.get_total_flops() == pytest.approx(geometry.tower(48) + geometry.projector(48))
    model = family_model("llava_onevision")
    model.set_attn_implementation("eager")
    tower = tile_tower(model.config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.vision_tower.encoder(model.model.vision_tower.embeddings(torch.randn(2, 3, 28, 28)))
    assert counter.get_total_flops() == pytest.approx(tower.tower(2))


@pytest.fixture(scope="module", params=NAMES)
def runs(request, tmp_path_factory):
    runs = FamilyRuns(tmp_path_factory.mktemp(request.param), request.param)
    runs.train("single")
    return runs


def test_a_run_learns_evaluates_and_exports(runs):
    metrics = runs.metrics("single")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert metrics[0]["tokens_stage_0"] > metrics[0]["tokens_stage_1"] > metrics[0]["tokens_stage_3"]
    assert json.loads((runs.directory("single") / "eval.jsonl").read_text())["answers"] == 8
    folder = runs.checkpoint("single") / "hf"
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.pruning["layers"] == [2, 4, 5] and model.config.pruning["positions"] == "keep"
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert processor.to_dict() == AutoImageProcessor.from_pretrained(runs.model, backend="pil").to_dict()
    words = AutoTokenizer.from_pretrained(folder)
    before = AutoModelForImageTextToText.from_pretrained(runs.model)
    assert words.get_vocab() == AutoTokenizer.from_pretrained(runs.model).get_vocab()
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
    assert prune(model).generate(torch.tensor([[1, 15, 16]]), max_new_tokens=2).shape[1] <= 5


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_train_like_one(runs, stage):
    """Each rank with other pictures, or none."""
    name = f"zero{stage}"
    runs.train(name, f"deepspeed=configs/deepspeed/{name}.json", ranks=2)
    expected = [m["loss"] for m in runs.metrics("single")]
    assert [m["loss"] for m in runs.metrics(name)] == pytest.approx(expected, abs=1e-5, rel=2e-5)


def test_a_run_stopped_and_resumed_ends_with_the_same_bits(runs):
    runs.train("resumed", "run.stop_after=2")
    runs.train("resumed")
    assert [m["loss"] for m in runs.metrics("resumed")] == [m["loss"] for m in runs.metrics("single")]
    assert_equal_checkpoints(runs.checkpoint("resumed"), runs.checkpoint("single"))
