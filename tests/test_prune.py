"""The front door on unmodified transformers models."""

import numpy as np
import pytest
import torch
from helpers import tiny_model, tiny_processor
from PIL import Image
from transformers import AutoModelForCausalLM, LlamaConfig, LlavaNextForConditionalGeneration

from vtprune_train import PyramidDrop, is_pruned, prune, unprune

TEXTS = [
    "<s> <image> what is shown here ? assistant : a red cat",
    "<s> <image> and <image> two dog",
    "<s> what is a dog",
]


def inputs(side="left"):
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in [(40, 70), (90, 30), (50, 50)]
    ]
    processor = tiny_processor()
    processor.tokenizer.padding_side = side
    made = processor(images=images, text=TEXTS, return_tensors="pt", padding=True)
    labels = made["input_ids"].masked_fill(made["input_ids"] == 4, -100)
    labels[:, :-4] = -100
    labels[made["attention_mask"] == 0] = -100
    return made, labels


def transformers_own(model, made, labels):
    positions = (made["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return model(**made, labels=labels, position_ids=positions)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text_type", ["llama", "mistral", "qwen2"])
def test_packed_dense_equals_transformers_padded(side, text_type):
    """Logits and all gradients."""
    made, labels = inputs(side)
    model = tiny_model(text_type=text_type)
    padded = transformers_own(model, made, labels)
    padded.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    prune(model, None)
    packed = model(**made, labels=labels)
    packed.loss.backward()
    real = made["attention_mask"].bool()
    assert (packed.logits - padded.logits)[real].abs().max() < 1e-4
    assert (packed.logits - padded.logits)[real].abs().mean() < 1e-5
    assert abs(packed.loss - padded.loss) < 1e-5
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert (grad - expected[name]).abs().max() < 1e-4 * expected[name].abs().max().clamp(min=1), name


def test_unprune_restores_the_model_exactly():
    made, labels = inputs()
    model = tiny_model()
    before_dict = {k: v for k, v in model.__dict__.items() if k != "_modules"}
    before_config = model.config.to_dict()
    names = list(model.state_dict())
    before = transformers_own(model, made, labels)
    prune(model, PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)))
    assert is_pruned(model)
    assert list(model.state_dict()) == names
    dropped = model(**made, labels=labels)
    assert abs(dropped.loss - before.loss) > 1e-4, "nothing was dropped"
    unprune(model)
    assert not is_pruned(model)
    after = transformers_own(model, made, labels)
    assert torch.equal(before.logits, after.logits)
    assert model.config.to_dict() == before_config
    assert {k: v for k, v in model.__dict__.items() if k != "_modules"} == before_dict
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_dropping_acts_on_the_number_of_logit_rows():
    made, labels = inputs("right")
    model = prune(tiny_model(), PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)))
    logits = model(**made, labels=labels).logits
    visual = (made["input_ids"] == 4).sum(dim=1)
    filled = (logits.abs().sum(dim=-1) > 0).sum(dim=1)
    text = made["attention_mask"].sum(dim=1) - visual
    assert filled[2] == text[2]
    assert filled[0] == text[0] + int(visual[0]) // 4


def test_settings_travel_with_the_checkpoint(tmp_path):
    model = prune(tiny_model(), PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), positions="keep"))
    model.save_pretrained(tmp_path)
    opened = LlavaNextForConditionalGeneration.from_pretrained(tmp_path)
    assert opened.config.pruning["layers"] == [2, 4]
    assert opened.config.pruning["positions"] == "keep"
    assert not is_pruned(opened)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: PyramidDrop(layers=(2, 9), keep=(0.5, 0.25)), "layer 9 does not exist in a decoder of 6"),
        (lambda: PyramidDrop(layers=(4, 2), keep=(0.5, 0.25)), r"layers=\[4, 2\] must increase"),
        (lambda: PyramidDrop(layers=(2, 4), keep=(0.25, 0.5)), "increases"),
        (lambda: PyramidDrop(layers=(2,), keep=(1.5,)), r"1.5 is not in \(0, 1\]"),
        (lambda: PyramidDrop(layers=(2,), keep=(0.5, 0.25)), "1 entries but keep"),
        (lambda: PyramidDrop(layers=(2,), keep=(0.5,), rank_with="later"), "'later' is not one of"),
    ],
)
def test_wrong_schedules_are_refused(method, message):
    with pytest.raises(ValueError, match=message):
        prune(tiny_model(), method())


def test_wrong_models_are_refused():
    llama = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    with pytest.raises(ValueError, match="cannot prune a LlamaForCausalLM"):
        prune(llama, PyramidDrop())
    model = prune(tiny_model(), PyramidDrop())
    with pytest.raises(ValueError, match="pruned already"):
        prune(model, PyramidDrop())
    unprune(model)
    with pytest.raises(ValueError, match="not pruned"):
        unprune(model)


def test_what_a_pruned_model_cannot_do_is_said():
    made, _ = inputs()
    model = prune(tiny_model(), PyramidDrop())
    with pytest.raises(ValueError, match="use_cache"):
        model(**made, use_cache=True)
    with pytest.raises(ValueError, match=r"images were given|image tokens"):
        model(**{**made, "pixel_values": made["pixel_values"][:2], "image_sizes": made["image_sizes"][:2]})
