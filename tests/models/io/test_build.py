"""Models from a checkpoint, from parts, and from sizes."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, LlavaNextForConditionalGeneration

from tests.support.helpers import tiny_config, tiny_model, tiny_processor
from tests.support.model_parts import TEXT_TYPES, built, from_parts, save_parts
from vtprune_train.config.load import load_config
from vtprune_train.config.model import ModelConfig
from vtprune_train.models.io.build import build_model, parts_of, resolve_checkpoint, saved_pruning, set_trainable
from vtprune_train.models.io.processors import build_processor
from vtprune_train.models.io.tokenizer import load_tokenizer


@pytest.mark.parametrize("text_type", TEXT_TYPES)
@pytest.mark.parametrize("tied", [False, True])
def test_parts_keep_their_weights(tmp_path, text_type, tied):
    language, tower = save_parts(tmp_path, text_type, tied)
    model, tokenizer = built(from_parts(tmp_path), tmp_path)
    rows = language.get_input_embeddings().weight.shape[0]
    for name, value in language.model.state_dict().items():
        ours = model.model.language_model.state_dict()[name]
        assert torch.equal(ours[:rows] if "embed_tokens" in name else ours, value), name
    assert torch.equal(model.lm_head.weight[:rows], language.lm_head.weight)
    for name, value in tower.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], value), name
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    assert model.config.image_token_id == image_id < model.get_input_embeddings().weight.shape[0]
    assert tokenizer.pad_token is not None
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied


def test_a_whole_clip_checkpoint_serves_as_tower(tmp_path):
    _, _ = save_parts(tmp_path)
    text = CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=tiny_config().vision_config.to_dict()))
    clip.save_pretrained(tmp_path / "tower")
    model, _ = built(from_parts(tmp_path), tmp_path)
    expected = clip.vision_model.state_dict()
    for name, value in model.model.vision_tower.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_projector_of_stage_1_and_nothing_else(tmp_path):
    save_parts(tmp_path)
    stage_1, tokenizer = built(from_parts(tmp_path), tmp_path)
    with torch.no_grad():
        stage_1.model.image_newline.fill_(3.0)
        stage_1.model.multi_modal_projector.linear_1.weight.fill_(2.0)
        stage_1.lm_head.weight.fill_(1.0)
    export = tmp_path / "run" / "checkpoints" / "step_00000007" / "hf"
    stage_1.save_pretrained(export)
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_00000007")
    with pytest.raises(ValueError, match="no complete checkpoint yet"):
        resolve_checkpoint(str(tmp_path / "run"))
    (export.parent / "manifest.json").write_text("{}")
    assert resolve_checkpoint(str(tmp_path / "run")) == str(export)
    assert resolve_checkpoint(str(export.parent)) == str(export)
    model = build_model(from_parts(tmp_path, projector=str(tmp_path / "run")), tokenizer)
    assert (model.model.image_newline == 3.0).all()
    assert (model.model.multi_modal_projector.linear_1.weight == 2.0).all()
    assert not (model.lm_head.weight == 1.0).all()


def test_projector_that_does_not_fit_is_refused(tmp_path):
    save_parts(tmp_path)
    other = LlavaNextForConditionalGeneration(tiny_config(head_dim=8))
    other.model.image_newline = torch.nn.Parameter(torch.zeros(99))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"image_newline has shape \(99,\), but this model needs \(32,\)"):
        built(from_parts(tmp_path, projector=str(tmp_path / "other")), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no image_newline in 0 safetensors file"):
        built(from_parts(tmp_path, projector=str(tmp_path / "empty")), tmp_path)


def test_checkpoint_folder_round_trip(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    model.save_pretrained(tmp_path)
    build_processor(model.config, processor.tokenizer).save_pretrained(tmp_path)
    opened, _ = built(ModelConfig(path=str(tmp_path), dtype="float32"), tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], value), name
    assert saved_pruning(str(tmp_path)) is None


def test_a_wrong_path_is_not_blamed_on_the_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model().config.save_pretrained("w/models/llava")

    def error_of(path):
        with pytest.raises(ValueError) as caught:
            load_tokenizer(ModelConfig(path=path), list, tmp_path / "none")
        return str(caught.value)

    assert error_of("w/models/lava") == (
        f"model.path=w/models/lava: no such folder here (working directory {tmp_path}), and the name is not a Hub id; "
        "did you mean w/models/llava?"
    )
    assert "the name cannot be loaded from the Hub (" in error_of("models/lava")
    assert error_of("w/models") == (
        "model.path=w/models: this folder has no config.json; these folders in it do: w/models/llava"
    )
    without_tokenizer = error_of("w/models/llava")
    assert "no readable tokenizer in w/models/llava (" in without_tokenizer
    assert without_tokenizer.endswith("; set model.tokenizer")


def test_wrong_origins_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"model.vision_tower.*no such folder here"):
        save_parts(tmp_path)
        built(from_parts(tmp_path).model_copy(update={"vision_tower": str(tmp_path / "nowhere")}), tmp_path)
    with pytest.raises(ValueError, match="is a llama; use a CLIP vision tower"):
        built(from_parts(tmp_path).model_copy(update={"vision_tower": str(tmp_path / "language")}), tmp_path)


def test_the_tokenizer_trained_for_a_model_from_sizes_has_its_visual_tokens(tmp_path):
    """Each is one token, also in the middle of a text, and the config names its id."""
    text = "what is in <image> and <video> ?"
    for recipe, with_video in (("quickstart.yaml", False), ("quickstart_video.yaml", True)):
        config = load_config(recipe).model
        tokenizer = load_tokenizer(config, lambda: [text] * 4, tmp_path / recipe)
        model = build_model(config, tokenizer)
        ids = tokenizer(text)["input_ids"]
        assert (
            ids.count(model.config.image_token_id) == 1 and tokenizer.decode(model.config.image_token_id) == "<image>"
        )
        assert (tokenizer.convert_tokens_to_ids("<video>") in ids) == with_video
        if with_video:
            assert tokenizer.decode(model.config.video_token_id) == "<video>"
            assert len({model.config.video_token_id, model.config.image_token_id, tokenizer.eos_token_id}) == 3


def test_trainable_parts():
    model = tiny_model()
    set_trainable(model, {"projector": 1e-3})
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "model.image_newline" in trained and all("projector" in n or "newline" in n for n in trained)
    set_trainable(model, {"vision_tower": 1e-3, "language_model": 1e-3})
    names = {part: [name for name, _ in parameters] for part, parameters in parts_of(model).items()}
    assert sum(map(len, names.values())) == len(list(model.named_parameters()))
    assert any("encoder.layers.2." in name for name in names["unused"]), "the last tower layer feeds nothing"
    assert any("post_layernorm" in name for name in names["unused"])
    assert not any(p.requires_grad for name, p in model.named_parameters() if name in names["unused"])
    assert "lm_head.weight" in names["language_model"]
