"""``vtprune convert``: checkpoints of the original LLaVA code, built here by their published names, in and out."""

import json

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

from tests.support.families import family_processor
from tests.support.helpers import tiny_model, tiny_processor, tiny_tokenizer
from tests.support.original_checkpoints import convert, original_names, read, refused, same, write_original
from vtprune_train import prune
from vtprune_train.models.families import family_of
from vtprune_train.models.io.build import _load_projector


@pytest.mark.parametrize("family", ["llava_next", "llava"])
@pytest.mark.parametrize(("shards", "tower_trained"), [("safetensors", True), ("bin", False)])
def test_there_and_back_with_the_same_bits_and_logits(tmp_path, family, shards, tower_trained):
    model = write_original(tmp_path / "original", family, shards, tower_trained)
    convert(tmp_path / "original", "hf", tmp_path / "hf")
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf").eval()
    assert type(opened) is type(model)
    own = AutoProcessor.from_pretrained(tmp_path / "hf")
    theirs = tiny_processor() if family == "llava_next" else family_processor(family)
    image, text = Image.new("RGB", (70, 40), "red"), "<image> what is shown here ?"
    inputs = own(images=image, text=text, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    if family == "llava_next":
        expected = theirs(images=image, text=text, return_tensors="pt")
        assert torch.equal(inputs["input_ids"], expected["input_ids"])
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    with torch.no_grad():
        assert torch.equal(opened(**inputs).logits, model(**inputs).logits)
    convert(tmp_path / "hf", "original", tmp_path / "back")
    whole = original_names(model)
    same(read(tmp_path / "back"), whole)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("original", "back"))
    assert {**after, "torch_dtype": None} == {**before, "torch_dtype": None}
    convert(tmp_path / "back", "hf", tmp_path / "again")
    for name, value in AutoModelForImageTextToText.from_pretrained(tmp_path / "again").state_dict().items():
        assert torch.equal(value, opened.state_dict()[name]), name


def test_the_vocabulary_grows_for_the_image_token_and_shrinks_again(tmp_path):
    model = tiny_model()
    rows = len(tiny_tokenizer()) - 3
    model.resize_token_embeddings(rows)
    source = tmp_path / "original"
    write_original(source)
    vocab = {token: number for token, number in tiny_tokenizer().get_vocab().items() if number < rows}
    vocab["<unused>"] = vocab.pop("<image>")  # as the original code: <image> has no row
    plain = Tokenizer(WordLevel(vocab, "<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="</s>").save_pretrained(source)
    weights = original_names(model)
    for file in source.glob("*.safetensors*"):
        file.unlink()
    save_torch_state_dict(weights, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    convert(source, "hf", tmp_path / "hf")
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    assert opened.lm_head.weight.shape[0] == 64 and torch.equal(opened.lm_head.weight[:rows], model.lm_head.weight)
    convert(tmp_path / "hf", "original", tmp_path / "back")
    same(read(tmp_path / "back"), weights)


def test_a_folder_of_hugging_face_becomes_an_original_one(tmp_path, caplog):
    model = tiny_model()
    model.save_pretrained(tmp_path / "hf")
    tiny_processor().save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", "original", tmp_path / "original", "--vision_tower", "openai/clip-vit-large-patch14-336")
    assert "pruning" not in caplog.text
    prune(model, "fastv").save_pretrained(tmp_path / "pruned")
    tiny_processor().save_pretrained(tmp_path / "pruned")
    convert(tmp_path / "pruned", "original", tmp_path / "dense", "--vision_tower", "openai/clip-vit-large-patch14-336")
    assert "the original code does not support pruning, so the settings of fastv are left out" in caplog.text
    same(read(tmp_path / "original"), original_names(model))
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    assert config["mm_projector_type"] == "mlp2x_gelu" and config["mm_patch_merge_type"] == "spatial_unpad"
    assert config["architectures"] == ["LlavaLlamaForCausalLM"] and config["rope_theta"] == 10000.0


def test_mm_projector_in_and_out(tmp_path):
    model = write_original(tmp_path / "original")
    convert(tmp_path / "original", "hf", tmp_path / "hf")
    for source in ("original", "hf"):
        convert(tmp_path / source, "mm_projector", tmp_path / f"{source}.bin")
        loaded = torch.load(tmp_path / f"{source}.bin", weights_only=True)
        expected = {n: v for n, v in original_names(model).items() if "mm_projector" in n or "newline" in n}
        same(loaded, expected)
    convert(tmp_path / "hf.bin", "projector", tmp_path / "projector")
    for source in ("hf.bin", "projector"):
        other = tiny_model(seed=9)
        loop = family_of(other).loop
        _load_projector(other, loop, str(tmp_path / source))
        assert torch.equal(other.model.image_newline, model.model.image_newline)
        assert torch.equal(
            other.model.multi_modal_projector.linear_2.weight, model.model.multi_modal_projector.linear_2.weight
        )


def test_options_without_effect_are_refused(tmp_path, capsys):
    for form in ("mm_projector", "projector"):
        said = refused(capsys, tmp_path, form, tmp_path / "out", "--vision_tower", "clip")
        assert f"--vision_tower has no effect with --to {form}" in said
    assert "--without_learned has no effect with --to hf" in refused(
        capsys, tmp_path, "hf", tmp_path / "out", "--without_learned"
    )


def test_a_linear_projector(tmp_path, capsys):
    model = write_original(tmp_path / "original", "llava", mm_projector_type="linear")
    weights = original_names(model)
    layer = {f"model.mm_projector.{part}": weights[f"model.mm_projector.0.{part}"] for part in ("weight", "bias")}
    weights = {name: value for name, value in weights.items() if "mm_projector" not in name} | layer
    for file in (tmp_path / "original").glob("*.safetensors*"):
        file.unlink()
    save_torch_state_dict(weights, tmp_path / "original")
    convert(tmp_path / "original", "hf", tmp_path / "hf")
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    features = torch.randn(5, 24)
    seen = opened.model.multi_modal_projector(features)
    assert torch.equal(seen, torch.nn.functional.linear(features, *layer.values()))
    convert(tmp_path / "hf", "original", tmp_path / "back")
    same(read(tmp_path / "back"), weights)
    convert(tmp_path / "hf", "mm_projector", tmp_path / "linear.bin")
    same(torch.load(tmp_path / "linear.bin", weights_only=True), layer)
    gelu = tiny_model()
    with pytest.raises(ValueError, match="is a linear projector; this model's has two layers and GELU"):
        _load_projector(gelu, family_of(gelu).loop, str(tmp_path / "linear.bin"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type='mlp3x_gelu' has no counterpart"),
        ({"model_type": "llava_mpt"}, "model_type='llava_mpt' is not known"),
        ({"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type='spatial' has no counterpart"),
        ({"mm_vision_tower": "nowhere/clip"}, "the vision tower nowhere/clip (--vision_tower): no such folder here"),
        ({"image_grid_pinpoints": "1 by 2"}, "image_grid_pinpoints='1 by 2' is not a list of (width, height)"),
        ({"num_hidden_layers": 7}, "tensor(s) are missing, for example model.layers.6."),
        ({"num_hidden_layers": 5}, "model.layers.5."),
        ({"intermediate_size": 49}, "config.json requires"),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path, capsys, settings, said):
    write_original(tmp_path / "original", **settings)
    assert said in refused(capsys, tmp_path / "original", "hf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_damaged_and_hostile_files_are_named(tmp_path, capsys):
    write_original(tmp_path / "original", shards="bin")
    (tmp_path / "original" / "pytorch_model-00002-of-00002.bin").unlink()
    assert "pytorch_model-00002-of-00002.bin, which is missing" in refused(
        capsys, tmp_path / "original", "hf", tmp_path / "hf"
    )

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"model.mm_projector.0.weight": Hostile()}, tmp_path / "hostile.bin")
    assert "hostile.bin names io.open: " in refused(capsys, tmp_path / "hostile.bin", "projector", tmp_path / "out")
    assert not (tmp_path / "executed").exists()
    torch.save({"model.mm_projector.0.weight": torch.ones(1)}, tmp_path / "part.bin")
    assert "no complete projector there" in refused(capsys, tmp_path / "part.bin", "projector", tmp_path / "out")
    assert "is only a projector" in refused(capsys, tmp_path / "part.bin", "hf", tmp_path / "out")
