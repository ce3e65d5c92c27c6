"""Checkpoints in the original LLaVA layout, and their conversion."""

import json

import torch
from huggingface_hub import save_torch_state_dict
from transformers import CLIPVisionModel

from tests.support.families import family_model
from tests.support.helpers import tiny_model, tiny_tokenizer
from vtprune_train.cli import main

MM = {"mm_hidden_size": 24, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "use_mm_proj": True}
NEXT = {
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [28, 84], [84, 28]],
}


def original_names(model):
    """A model's tensors under the names that the original code saves."""
    named = {}
    for name, value in model.state_dict().items():
        short = name.removeprefix("model.")
        short = short.replace("multi_modal_projector.linear_1", "mm_projector.0")
        short = short.replace("multi_modal_projector.linear_2", "mm_projector.2")
        short = short.replace("language_model.", "")
        if short.startswith("vision_tower."):
            short = "vision_tower.vision_tower.vision_model." + short.removeprefix("vision_tower.")
        named[short if short.startswith("lm_head") else f"model.{short}"] = value.clone()
    return named


def write_original(folder, family="llava_next", shards="safetensors", tower_trained=True, **settings):
    """An original checkpoint, and the model it holds."""
    model = tiny_model().eval() if family == "llava_next" else family_model(family)
    folder.mkdir(parents=True)
    tower = folder.parent / "clip"
    vision = CLIPVisionModel(model.config.vision_config)
    vision.load_state_dict(model.model.vision_tower.state_dict())
    vision.save_pretrained(tower)
    weights = original_names(model)
    if not tower_trained:
        weights = {name: value for name, value in weights.items() if "vision_tower" not in name}
    if shards == "safetensors":
        save_torch_state_dict(weights, folder, max_shard_size="60KB")
    else:
        names = sorted(weights)
        files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
        for file in set(files.values()):
            torch.save({name: weights[name] for name in names if files[name] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    text = model.config.text_config.to_dict()
    theta = text.pop("rope_parameters")["rope_theta"]
    config = {
        **text, "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "rope_theta": theta,
        "mm_vision_tower": str(tower), "mm_projector_type": "mlp2x_gelu", **MM,
        **(NEXT if family == "llava_next" else {}),
        **settings,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(folder)
    return model


def convert(source, form, out, *more):
    assert main(["convert", "--model", str(source), "--to", form, "--out", str(out), *more]) == 0


def refused(capsys, source, form, out, *more):
    assert main(["convert", "--model", str(source), "--to", form, "--out", str(out), *more]) == 2
    return capsys.readouterr().err


def read(folder):
    from vtprune_train.models.io.original import read_weights

    return read_weights(folder)


def same(one, two):
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one)
