"""Settings of the original LLaVA code by their meaning: tiles and pixels equal to its own functions, or a refusal."""

import json
import math

import numpy as np
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, CLIPImageProcessorPil, CLIPVisionModel

from tests.support.families import family_model, family_processor, tokenizer
from tests.support.helpers import tiny_model, tiny_processor
from tests.support.original_checkpoints import convert, original_names, read, refused, same, write_original
from vtprune_train.cli import main
from vtprune_train.config.model import ModelConfig
from vtprune_train.models.families import family_of
from vtprune_train.models.io.build import _load_projector, build_model
from vtprune_train.models.io.processors import open_processor

TILE = 28
TALL = [[28, 56], [28, 84]]  # (width, height): one column of two and of three tiles
SIZES = [(30, 90), (90, 30), (50, 40), (28, 28), (200, 61)]  # (width, height)


def image(size):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def best_resolution(size, resolutions):
    """``select_best_resolution`` of llava/mm_utils.py; all sizes are (width, height)."""
    best, most, least = None, 0, math.inf
    for width, height in resolutions:
        scale = min(width / size[0], height / size[1])
        effective = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        wasted = width * height - effective
        if effective > most or (effective == most and wasted < least):
            best, most, least = (width, height), effective, wasted
    return best


def original_tiles(image, images, resolutions):
    """``process_anyres_image`` of llava/mm_utils.py."""
    width, height = best_resolution(image.size, resolutions)
    scales = width / image.size[0], height / image.size[1]
    if scales[0] < scales[1]:
        new = width, min(math.ceil(image.size[1] * scales[0]), height)
    else:
        new = min(math.ceil(image.size[0] * scales[1]), width), height
    padded = Image.new("RGB", (width, height), (0, 0, 0))
    padded.paste(image.resize(new), ((width - new[0]) // 2, (height - new[1]) // 2))
    tiles = [image.resize((TILE, TILE))]
    for top in range(0, height, TILE):
        tiles += [padded.crop((left, top, left + TILE, top + TILE)) for left in range(0, width, TILE)]
    return torch.stack([images(tile, return_tensors="pt")["pixel_values"][0] for tile in tiles])


def original_square(image, images):
    """``expand2square`` of llava/mm_utils.py and the processing behind it."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in images.image_mean))
    square.paste(image, ((side - image.size[0]) // 2, (side - image.size[1]) // 2))
    return images(square, return_tensors="pt")["pixel_values"]


def tower_images(folder, **numbers):
    """The image processor in the tower's folder, which the original code takes."""
    images = CLIPImageProcessorPil(size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, **numbers)
    images.save_pretrained(folder / "clip")
    return images


def opened(folder):
    return open_processor(str(folder), AutoConfig.from_pretrained(folder))


def edit(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


POINTS = [
    (TALL, TALL),
    (str([tuple(point) for point in TALL]), TALL),
    ("(1x1),...,(2x3)", [[28 * c, 28 * r] for c in (1, 2) for r in (1, 2, 3)]),
    ([[28, 56], [56, 28], [56, 56], [28, 84], [84, 28]], None),
]


@pytest.mark.parametrize(("points", "resolutions"), POINTS, ids=["tall", "string", "range", "published"])
def test_tiles_are_those_of_the_original_both_ways(tmp_path, points, resolutions):
    write_original(tmp_path / "original", image_grid_pinpoints=points)
    images = tower_images(tmp_path, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    convert(tmp_path / "original", "hf", tmp_path / "hf")
    processor, resolutions = opened(tmp_path / "hf"), resolutions or points
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    expected = [[height, width] for width, height in resolutions]
    assert config["image_grid_pinpoints"] == processor.image_processor.image_grid_pinpoints == expected
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    for size in SIZES:
        made = processor(images=image(size), text="<image> what", return_tensors="pt")
        wanted = original_tiles(image(size), images, resolutions)
        assert made["pixel_values"][0].shape == wanted.shape, size
        assert torch.allclose(made["pixel_values"][0], wanted, atol=1e-6), size
        made.pop("token_type_ids", None)
        model(**made)  # it counts the tokens of these tiles
    convert(tmp_path / "hf", "original", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["image_grid_pinpoints"] == points
    edit(tmp_path / "hf", original_llava=None)  # as a folder that never was an original one
    convert(tmp_path / "hf", "original", tmp_path / "made", "--vision_tower", str(tmp_path / "clip"))
    assert json.loads((tmp_path / "made" / "config.json").read_text())["image_grid_pinpoints"] == resolutions


@pytest.mark.parametrize("aspect", ["pad", "square", None])
def test_one_tile_is_padded_or_cropped_as_the_original_does(tmp_path, aspect):
    own = {} if aspect is None else {"image_aspect_ratio": aspect}
    write_original(tmp_path / "original", "llava", **own)
    images = tower_images(tmp_path, image_mean=[0.1, 0.2, 0.3])
    convert(tmp_path / "original", "hf", tmp_path / "hf")
    for size in SIZES:
        made = opened(tmp_path / "hf")(images=image(size), text="<image> what", return_tensors="pt")["pixel_values"]
        plain = images(image(size), return_tensors="pt")["pixel_values"]
        wanted = original_square(image(size), images) if aspect == "pad" else plain
        assert torch.allclose(made, wanted, atol=1e-6), size
    edit(tmp_path / "hf", original_llava=None)
    convert(tmp_path / "hf", "original", tmp_path / "made", "--vision_tower", str(tmp_path / "clip"))
    made = json.loads((tmp_path / "made" / "config.json").read_text())
    assert (made["image_aspect_ratio"], made["mm_patch_merge_type"]) == (aspect or "square", "flat")


def test_settings_of_the_language_model_and_the_tokenizer_are_carried_over(tmp_path):
    settings = {
        "rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "rms_norm_eps": 1e-4,
        "attention_bias": False, "max_position_embeddings": 777, "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 555, "mm_use_im_patch_token": True, "mm_use_im_start_end": False,
        "tune_mm_mlp_adapter": False, "image_crop_resolution": 224, "mm_resampler_type": None, "pretraining_tp": 1,
    }  # fmt: skip
    write_original(tmp_path / "original", "llava", **settings)
    convert(tmp_path / "original", "hf", tmp_path / "hf")
    text = AutoConfig.from_pretrained(tmp_path / "hf").text_config
    rope = text.rope_parameters
    assert (rope["rope_theta"], rope["rope_type"], rope["factor"]) == (500000.0, "linear", 2.0)
    assert (text.rms_norm_eps, text.max_position_embeddings) == (1e-4, 777)
    words = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (words.padding_side, words.model_max_length) == ("right", 555)
    convert(tmp_path / "hf", "original", tmp_path / "back")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: back[key] for key in settings} == settings
    # What is changed in the meantime is written, beside what was kept.
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 999
    edit(tmp_path / "hf", text_config=config["text_config"], vision_feature_layer=-1)
    convert(tmp_path / "hf", "original", tmp_path / "changed")
    changed = json.loads((tmp_path / "changed" / "config.json").read_text())
    assert {key: value for key, value in changed.items() if back.get(key) != value} == {
        "max_position_embeddings": 999, "mm_vision_select_layer": -1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("llava", {"mm_use_im_start_end": True}, "mm_use_im_start_end=True cannot be converted: the original code wr"),
        ("llava", {"s2": True}, "s2=True cannot be converted"),
        ("llava", {"mm_resampler_type": "perceiver"}, "mm_resampler_type='perceiver' cannot be converted"),
        ("llava", {"quantization_config": {"load_in_4bit": True}}, "quantized weights are not converted"),
        ("llava", {"mm_projector_type": "identity"}, "mm_projector_type='identity' has no counterpart"),
        ("llava", {"mm_projector_type": "linear"}, "mm_projector_type='linear' in config.json does not match"),
        ("llava", {"mm_vision_select_feature": "slicefour_patch"}, "mm_vision_select_feature='slicefour_patch' has no"),
        ("llava", {"mm_vision_select_layer": None}, "mm_vision_select_layer=None is not a layer of the vision tower"),
        ("llava", {"mm_vision_select_layer": -9}, "mm_vision_select_layer=-9 is not a layer of the vision tower"),
        ("llava", {"image_aspect_ratio": "anyres"}, "image_aspect_ratio='anyres' with mm_patch_merge_type='flat' has"),
        ("llava", {"mm_hidden_size": 48}, "mm_hidden_size=48, but the vision tower's hidden_size is 24"),
        ("llava", {"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter"}, None),
        ("llava", {"mm_vision_select_layer": True}, "mm_vision_select_layer=True is not a layer of the vision tower"),
        ("llava", {"mm_vision_tower": ["clip"]}, "mm_vision_tower in config.json is ['clip']; set --vision_tower"),
        ("llava", {"vocab_size": "64"}, "transformers refuses a setting of config.json: Field 'vocab_size' expected"),
        ("llava", {"rope_scaling": {"factor": 2.0}}, "rope_scaling={'factor': 2.0} has none of the types default, "),
        ("llava", {"image_hue": 3}, "image_hue=3 is unknown and may change the model's input"),
        ("llava", {"hidden_act": "silu", "my_note": "x"}, None),
        ("llava_next", {"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio='anyres_max_9' with mm_patch_merge"),
        ("llava_next", {"image_aspect_ratio": "pad"}, "image_aspect_ratio='pad' with mm_patch_merge_type='spatial_un"),
        ("llava_next", {"mm_patch_merge_type": "spatial_unpad_maxpool2x2"}, "'spatial_unpad_maxpool2x2' has no coun"),
        (
            "llava_next",
            {"mm_vision_select_feature": "cls_patch"},
            "mm_vision_select_feature='cls_patch' is not supported",
        ),
        ("llava_next", {"image_grid_pinpoints": [[28, 30]]}, "image_grid_pinpoints [[28, 30]] are not multiples"),
        ("llava_next", {"image_grid_pinpoints": []}, "image_grid_pinpoints=[] is not a list of (width, height)"),
    ],
)
def test_each_setting_is_honoured_or_refused_by_name(tmp_path, capsys, family, settings, said):
    write_original(tmp_path / "original", family, **settings)
    if said is None:
        convert(tmp_path / "original", "hf", tmp_path / "hf")
    else:
        assert said in refused(capsys, tmp_path / "original", "hf", tmp_path / "hf")
        assert not (tmp_path / "hf").exists()


def test_flags_of_the_tower_s_image_processor_are_kept(tmp_path, capsys):
    write_original(tmp_path / "original", "llava", image_aspect_ratio="pad")
    images = tower_images(tmp_path, do_normalize=False, do_rescale=False)
    convert(tmp_path / "original", "hf", tmp_path / "hf")
    made = opened(tmp_path / "hf")(images=image((30, 30)), text="<image> what", return_tensors="pt")["pixel_values"]
    assert torch.equal(made, images(image((30, 30)), return_tensors="pt")["pixel_values"])
    processor = opened(tmp_path / "hf")
    processor.image_processor.do_rescale = True
    processor.save_pretrained(tmp_path / "hf")
    said = refused(capsys, tmp_path / "hf", "original", tmp_path / "back")
    assert "its image processor has do_rescale=True, but the original code uses" in said
    (tmp_path / "clip" / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}')
    said = refused(capsys, tmp_path / "original", "hf", tmp_path / "other")
    assert "preprocessor_config.json produces images of [None, None, None], but the tower takes 28 x 28" in said


WRONG_PROJECTORS = [
    ("0.weight", torch.ones(0), "model.mm_projector.0.weight is empty (it was saved under DeepSpeed ZeRO-3"),
    ("0.weight", torch.ones(32, 24, dtype=torch.int8), "0.weight holds torch.int8; quantized weights are not"),
    ("2.weight", torch.ones(32, 31), "2.weight has shape (32, 31), which does not fit (32, 32)"),
    ("2.bias", torch.ones(31), "2.bias has shape (31,), which does not fit (32,)"),
    ("model.embed_tokens.weight", torch.ones(64, 32), "model.embed_tokens.weight was trained with the projector"),
]


@pytest.mark.parametrize(("name", "value", "said"), WRONG_PROJECTORS, ids=lambda value: str(value)[:20])
def test_a_projector_whose_tensors_do_not_fit_is_refused(tmp_path, capsys, name, value, said):
    weights = {"0.weight": torch.ones(32, 24), "0.bias": torch.ones(32)}
    weights |= {"2.weight": torch.ones(32, 32), "2.bias": torch.ones(32), name: value}
    file = tmp_path / "mm_projector.bin"
    torch.save({n if n.startswith("model.") else f"model.mm_projector.{n}": v for n, v in weights.items()}, file)
    assert said in refused(capsys, file, "projector", tmp_path / "projector")
    model = family_model("llava")
    with pytest.raises(ValueError, match=r"model.projector=.*"):
        _load_projector(model, family_of(model).loop, str(file))


def test_the_class_token_is_kept_where_the_original_keeps_it(tmp_path):
    write_original(tmp_path / "original", "llava", mm_vision_select_feature="cls_patch")
    convert(tmp_path / "original", "hf", tmp_path / "hf")
    made = opened(tmp_path / "hf")(images=image((40, 40)), text="<image> what", return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    assert (made["input_ids"] == model.config.image_token_id).sum() == 17
    made.pop("token_type_ids", None)
    model(**made)
    convert(tmp_path / "hf", "original", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["mm_vision_select_feature"] == "cls_patch"


def other_tower(folder):
    """Another tower in the checkpoint than in the folder that it names."""
    weights = read(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    changed = {name: value + ("vision_tower" in name) for name, value in weights.items()}
    save_torch_state_dict(changed, folder)
    return weights, changed


@pytest.mark.parametrize("trained", [True, False])
def test_the_tower_is_the_one_that_the_original_code_would_use(tmp_path, caplog, trained):
    write_original(tmp_path / "original", "llava", unfreeze_mm_vision_tower=trained)
    named, inside = other_tower(tmp_path / "original")
    convert(tmp_path / "original", "hf", tmp_path / "hf")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    same(original_names(model), inside if trained else named)
    assert ("differs from" in caplog.text) is not trained
    convert(tmp_path / "hf", "original", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["unfreeze_mm_vision_tower"] is trained


def test_a_tower_trained_here_is_read_from_the_checkpoint_there(tmp_path):
    write_original(tmp_path / "original", "llava")
    convert(tmp_path / "original", "hf", tmp_path / "hf")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        next(model.model.vision_tower.parameters()).add_(1)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", "original", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["unfreeze_mm_vision_tower"] is True
    same(read(tmp_path / "back"), original_names(model))


def test_a_trained_tower_that_is_missing_is_refused(tmp_path, capsys):
    write_original(tmp_path / "original", "llava", tower_trained=False, unfreeze_mm_vision_tower=True)
    said = refused(capsys, tmp_path / "original", "hf", tmp_path / "hf")
    assert (
        "the vision tower was trained (unfreeze_mm_vision_tower), but the checkpoint has no vision-tower weights"
        in said
    )


def test_an_image_processor_that_the_original_cannot_have_is_refused(tmp_path, capsys):
    write_original(tmp_path / "original", "llava")
    convert(tmp_path / "original", "hf", tmp_path / "hf")
    processor = opened(tmp_path / "hf")
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    processor.save_pretrained(tmp_path / "hf")
    said = refused(capsys, tmp_path / "hf", "original", tmp_path / "back")
    assert "its image processor has image_mean=[0.5, 0.5, 0.5], but the original code uses" in said


def broken(folder, kind):
    """Damage an original checkpoint, and what must be said of it."""
    first = sorted(folder.glob("*.safetensors"))[0]
    config = folder / "config.json"
    if kind == "empty":
        first.write_bytes(b"")
    elif kind == "cut off":
        first.write_bytes(first.read_bytes()[:-100])
    elif kind == "no config":
        config.unlink()
        return "has no config.json; copy the whole checkpoint"
    elif kind == "empty config":
        config.write_text("")
        return "config.json is not JSON"
    elif kind == "empty index":
        (folder / "model.safetensors.index.json").write_text("")
        return "model.safetensors.index.json is not JSON with a weight_map"
    elif kind == "left over":  # and no index says which files count
        (folder / "model.safetensors.index.json").unlink()
        save_file({"lm_head.weight": torch.ones(64, 32)}, folder / "old.safetensors", {"format": "pt"})
        return "contains lm_head.weight, and so does another file; remove the outdated one"
    elif kind == "generation config":
        (folder / "generation_config.json").write_text("{")
        return "generation_config.json is not JSON: Expecting property name"
    elif kind == "no weights":
        [file.unlink() for file in folder.glob("*.safetensors*")]
        return "holds no weights"
    elif kind == "projector alone":
        [file.unlink() for file in folder.glob("*.safetensors*")]
        torch.save({}, folder / "mm_projector.bin")
        return "is only a projector (mm_projector.bin, tune_mm_mlp_adapter)"
    elif kind == "LoRA":
        torch.save({}, folder / "non_lora_trainables.bin")
        return "is a LoRA adapter of the original code, not a model; merge it first"
    else:
        weights = read(folder)
        name = next(name for name in weights if name.endswith("q_proj.weight") and "tower" not in name)
        weights[name] = torch.ones(0) if kind == "ZeRO-3" else weights[name].to(torch.int8)
        [file.unlink() for file in folder.glob("*.safetensors*")]
        save_torch_state_dict(weights, folder)
        return f"{name} has shape (0,) (it was saved under" if kind == "ZeRO-3" else f"{name} has the data type"
    return f"{first.name} cannot be read"


KINDS = (
    "empty", "cut off", "no config", "empty config", "empty index", "no weights", "projector alone", "LoRA", "ZeRO-3",
    "int8", "generation config", "left over",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_and_partial_checkpoints_are_named(tmp_path, capsys, kind):
    write_original(tmp_path / "original", "llava")
    said = broken(tmp_path / "original", kind)
    assert said in refused(capsys, tmp_path / "original", "hf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_folder_of_stage_1_gives_its_projector(tmp_path):
    model = write_original(tmp_path / "original", "llava", tune_mm_mlp_adapter=True)
    projector = {name: value for name, value in original_names(model).items() if "mm_projector" in name}
    for file in (tmp_path / "original").glob("*.safetensors*"):
        file.unlink()
    torch.save(projector, tmp_path / "original" / "mm_projector.bin")
    convert(tmp_path / "original", "projector", tmp_path / "projector")
    convert(tmp_path / "original", "mm_projector", tmp_path / "again.bin")
    same(torch.load(tmp_path / "again.bin", weights_only=True), projector)
    other = family_model("llava", seed=3)
    _load_projector(other, family_of(other).loop, str(tmp_path / "original"))
    same({name: value for name, value in original_names(other).items() if "mm_projector" in name}, projector)
    other.config.projector_hidden_act = "linear"
    with pytest.raises(ValueError, match="has two layers and GELU; this model's projector is linear"):
        _load_projector(other, family_of(other).loop, str(tmp_path / "original"))


@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_an_original_folder_is_not_opened_as_a_hugging_face_one(tmp_path, capsys, model_type):
    """transformers knows model_type llava too, and would start every weight at random."""
    write_original(tmp_path / "original", "llava", model_type=model_type)
    assert main(["generate", "--model", str(tmp_path / "original"), "--prompt", "what ?"]) == 2
    said = capsys.readouterr().err
    assert (
        "this is a checkpoint of the original LLaVA code; convert it to a Hugging Face folder first: vtprune convert"
        in said
    )


@pytest.mark.parametrize("kind", ["missing", "empty", "shape"])
def test_a_checkpoint_whose_weights_are_not_whole_is_not_opened(tmp_path, capsys, kind):
    model = family_model("llava")
    model.save_pretrained(tmp_path)
    family_processor("llava").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("layers.3.mlp.down_proj.weight"))
    if kind == "empty":
        file.write_bytes(b"")
    else:
        wrong = {} if kind == "missing" else {name: weights[name][:, :3].contiguous()}
        weights.pop(name)
        save_file({**weights, **wrong}, file, {"format": "pt"})
    said = {
        "missing": "1 weight(s) of the LlavaForConditionalGeneration are missing, first model.language_model.layers.3"
    }
    config = ModelConfig(path=str(tmp_path), dtype="float32")
    with pytest.raises(ValueError, match=f"model.path={tmp_path}: "):
        build_model(config, tokenizer())
    assert main(["generate", "--model", str(tmp_path), "--prompt", "what ?"]) == 2
    assert said.get(kind, f"model {tmp_path}: cannot be loaded") in capsys.readouterr().err


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("text_type", ["mistral", "qwen2"])
def test_other_language_models_there_and_back(tmp_path, text_type, tied):
    """With their own settings, and a head that is the embeddings."""
    model = tiny_model(text_type=text_type, tie_word_embeddings=tied).eval()
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    CLIPVisionModel(model.config.vision_config).save_pretrained(tmp_path / "clip")
    model.save_pretrained(tmp_path / "hf")
    tiny_processor().save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", "original", tmp_path / "original", "--vision_tower", str(tmp_path / "clip"))
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    assert config["model_type"] == {"mistral": "llava_mistral", "qwen2": "llava_qwen"}[text_type]
    assert config["unfreeze_mm_vision_tower"] is True and config["tie_word_embeddings"] is tied
    convert(tmp_path / "original", "hf", tmp_path / "again")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again").eval()
    inputs = opened(tmp_path / "again")(images=image((70, 40)), text="<image> what", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    convert(tmp_path / "again", "original", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    same(read(tmp_path / "back"), read(tmp_path / "original"))
