"""Processors put together from their parts: equal to transformers' own, without torchvision, and from old files."""

import copy
import json
import logging
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, LlavaImageProcessorPil, Qwen2VLImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tests.support.checkpoints import save_folder, talkative
from tests.support.families import PATCH, QWEN_SIZE, TILE, family_model, family_processor, tokenizer
from tests.support.family_runs import save_checkpoint
from tests.support.helpers import tiny_processor
from vtprune_train.evaluation.answering import answers, load, load_processor
from vtprune_train.models.families.layout import Clip
from vtprune_train.models.io.processors import build_image_processor, build_processor, open_processor
from vtprune_train.models.io.video_processor import DecodedVideo, video_keywords

COUNTING = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
IMAGE = Image.effect_noise((90, 40), 80).convert("RGB")


def inputs_of(processor):
    text = f"what {processor.image_token} shown here ?"
    made = processor(images=[IMAGE], text=[text], return_tensors="pt")
    return {key: value for key, value in made.items() if key != "token_type_ids"}


def opened(folder):
    return open_processor(str(folder), AutoConfig.from_pretrained(folder))


def assert_same_inputs(one, two):
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(two[key])), key


def edit(folder, change, name="processor_config.json"):
    settings = json.loads((folder / name).read_text())
    change(settings)
    (folder / name).write_text(json.dumps(settings))


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_equal_to_transformers_where_it_needs_no_torchvision(tmp_path, name):
    family_model(name).config.save_pretrained(tmp_path)
    family_processor(name).save_pretrained(tmp_path)
    assert_same_inputs(inputs_of(opened(tmp_path)), inputs_of(AutoProcessor.from_pretrained(tmp_path)))


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "qwen2_5_vl"])
def test_a_processor_goes_to_worker_processes(name):
    processor = build_processor(family_model(name).config, tokenizer())
    for other in (pickle.loads(pickle.dumps(processor)), copy.deepcopy(processor)):
        assert type(other) is type(processor) and other.to_dict() == processor.to_dict()
        assert_same_inputs(inputs_of(other), inputs_of(processor))


@pytest.mark.parametrize("name", ["llava", "llava_next"])
@pytest.mark.parametrize("lacking", [COUNTING, COUNTING[2:], ()], ids=["all", "class token", "wrong"])
def test_counts_come_from_the_model_where_old_files_lack_them(tmp_path, name, lacking, caplog):
    model = family_model(name)
    model.save_pretrained(tmp_path)
    family_processor(name).save_pretrained(tmp_path)
    expected = inputs_of(opened(tmp_path))
    wrong = {} if lacking else {"patch_size": 2 * PATCH}
    edit(tmp_path, lambda settings: ([settings.pop(key) for key in lacking] and None) or settings.update(wrong))
    with caplog.at_level(logging.INFO):
        made = inputs_of(opened(tmp_path))
    assert_same_inputs(made, expected)
    model(**made)
    said = [record for record in caplog.records if "taken from the model's config" in record.message]
    for key in lacking:
        assert f"{key}=" in said[0].message
    if wrong:
        assert f"do not fit the model; using patch_size={PATCH} instead of {2 * PATCH}" in caplog.text


def test_answers_are_the_same_from_a_processor_that_lacks_settings(tmp_path):
    folders = [save_folder(tmp_path / name, model=talkative()) for name in ("whole", "old")]
    edit(folders[1], lambda settings: [settings.pop(key) for key in COUNTING])
    one, two = (answers(load(str(folder)), [([IMAGE], "what is shown ?")], max_new_tokens=5) for folder in folders)
    assert one == two


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "internvl"])
def test_families_that_are_only_asked_need_no_torchvision_either(tmp_path, name):
    model, words = family_model(name), tokenizer()
    images = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, size=QWEN_SIZE, temporal_patch_size=2)
    if name == "internvl":
        images = GotOcr2ImageProcessorPil(size={"height": TILE, "width": TILE}, crop_to_patches=True, max_patches=4)
        words.init_kwargs.update(
            start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<v>"
        )
    for part in (model.config, words, images):
        part.save_pretrained(tmp_path)
    made = inputs_of(opened(tmp_path))
    model(**made)
    loaded = load_processor(str(tmp_path), model.config)
    loaded.save_pretrained(tmp_path / "again")
    model.config.save_pretrained(tmp_path / "again")
    assert_same_inputs(inputs_of(opened(tmp_path / "again")), made)
    with pytest.raises(ValueError, match=r"1 video\(s\) need as many video_metadata, each with fps"):
        loaded(text=[loaded.video_token], videos=[[IMAGE]])


@pytest.mark.parametrize("place", ["nested", "video_preprocessor_config.json", "preprocessor_config.json"])
def test_settings_of_a_video_processor_are_carried_over(tmp_path, place):
    base = save_checkpoint("qwen2_5_vl", tmp_path / "base")
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 3}
    if place == "nested":
        settings = {"processor_class": "Qwen2_5_VLProcessor", "video_processor": video}
        (base / "processor_config.json").write_text(json.dumps(settings))
    elif place == "preprocessor_config.json":  # where transformers looks last, and infers the class
        video = json.loads((base / place).read_text())
    else:
        (base / place).write_text(json.dumps(video))
    for folder in ("one", "two"):  # saved, and saved again after it was opened
        opened(base).save_pretrained(tmp_path / folder)
        AutoConfig.from_pretrained(base).save_pretrained(tmp_path / folder)
        base = tmp_path / folder
        saved = json.loads((base / "processor_config.json").read_text())
        assert saved["video_processor"] == video and saved["processor_class"] == "Qwen2_5_VLProcessor"


def test_a_checkpoints_image_processor_is_kept_whatever_its_class(tmp_path):
    """LLaVA-1.5 comes with CLIP's or with its own, which can pad images to squares."""
    family_model("llava").config.save_pretrained(tmp_path)
    padding = LlavaImageProcessorPil(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, do_pad=True, image_mean=[0.1, 0.2, 0.3]
    )
    padding.save_pretrained(tmp_path)
    kept = build_image_processor(AutoConfig.from_pretrained(tmp_path), str(tmp_path))
    assert kept.to_dict() == padding.to_dict()


def test_an_image_processor_of_another_family_is_replaced_with_a_warning(tmp_path, caplog):
    config = family_model("llava_next").config
    family_processor("llava").image_processor.save_pretrained(tmp_path)
    made = build_image_processor(config, str(tmp_path))
    assert type(made).__name__ == "LlavaNextImageProcessorPil"
    assert "its image processor is a CLIPImageProcessor; using a LlavaNext" in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[]"], ids=["empty", "cut off", "a list"])
@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_damaged_files_are_refused_and_not_replaced(tmp_path, name, content):
    family_model("llava").config.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        opened(tmp_path)


def test_a_tokenizer_without_the_image_token_is_refused(tmp_path):
    save_checkpoint("qwen2_5_vl", tmp_path)
    tiny_processor().tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its tokenizer has no image token <\|image_pad\|>"):
        opened(tmp_path)


def test_a_chat_template_in_the_old_file_is_kept(tmp_path):
    base = save_checkpoint("llava_onevision", tmp_path / "base")
    (base / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    opened(base).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


@pytest.mark.parametrize("stride", [1, 2])
def test_video_tokens_follow_the_pooling_stride(stride):
    """transformers' LlavaNextVideoProcessor counts tokens for a stride of 2 only; the quickstart has 1."""
    default = family_model("llava_next_video")
    default.config.spatial_pool_stride = stride
    model = type(default)(default.config)
    processor = build_processor(model.config, tokenizer(), None)
    video = DecodedVideo(Clip(TILE, TILE, (0, 2, 4), 6, 2.0), np.zeros((3, TILE, TILE, 3), dtype=np.uint8))
    made = processor(text=[f"what {processor.video_token}"], return_tensors="pt", **video_keywords([video]))
    tokens = int((made["input_ids"] == model.config.video_token_id).sum())
    assert tokens == 3 * (TILE // PATCH // stride) ** 2
    made.pop("token_type_ids", None)
    assert torch.isfinite(model(**{k: v for k, v in made.items() if k != "video_metadata"}).logits).all()
