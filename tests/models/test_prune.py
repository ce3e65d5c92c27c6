"""The front door on unmodified transformers models."""

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, LlamaConfig, LlavaNextForConditionalGeneration

from tests.support.families import FAMILIES, family_inputs, family_model
from tests.support.helpers import tiny_model, tiny_processor
from vtprune_train import FastV, PyramidDrop, dense, is_pruned, prune, unprune
from vtprune_train.models.forward.padded import kept_tokens
from vtprune_train.models.patch import method_of
from vtprune_train.pruning import METHODS, method_from_settings
from vtprune_train.pruning.describe import schedule

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


def test_print_says_how_the_model_is_pruned():
    model = tiny_model()
    dense_text, names = str(model), list(model.state_dict())
    first, _, rest = dense_text.partition("\n")
    prune(model, PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)))
    line = f"  pruned by {schedule(method_of(model), 6)}"
    assert line.startswith("  pruned by pyramiddrop: before layers 2, 4 of 6 it keeps 0.5, 0.25")
    assert str(model) == f"{first}\n{line}\n{rest}" == str(copy.deepcopy(model))
    assert list(model.state_dict()) == names
    with dense(model):
        assert str(model) == dense_text
    assert str(unprune(model)) == dense_text
    assert str(prune(model, None)).splitlines()[1] == "  packed, nothing is dropped"


def test_kept_tokens_of_a_dense_model_are_refused():
    made, _ = inputs()
    with pytest.raises(ValueError, match=r"kept_tokens needs a pruned model; call prune\(model, method\) first"):
        kept_tokens(tiny_model(), dict(made.items()))


def test_rows_of_dropped_tokens_repeat_the_last_survivor():
    made, _ = inputs("right")
    model = prune(tiny_model(), PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)))
    logits = model(**made).logits
    kept = kept_tokens(model, dict(made.items()))
    visual = made["input_ids"] == 4
    assert [[len(drops[-1]) for drops in row] for row in kept] == [
        [int(visual[0].sum()) // 4],
        [length // 4 for length in runs(visual[1])],
        [],
    ]
    for row, mask in enumerate(made["attention_mask"].bool()):
        ends = [index for index in range(len(mask) - 1) if visual[row, index] and not visual[row, index + 1]]
        for image, end in enumerate(ends):
            start = end + 1 - runs(visual[row])[image]
            remaining = {start + int(index) for index in kept[row][image][-1]}
            source = start - 1
            for index in range(start, end + 1):
                source = index if index in remaining else source
                assert torch.equal(logits[row, index], logits[row, source])
    assert logits[2, 5:].unique(dim=0).shape[0] == 1, "padding on the right repeats the last token"


def runs(flags):
    lengths, current = [], 0
    for flag in [*flags.tolist(), False]:
        if flag:
            current += 1
        elif current:
            lengths.append(current)
            current = 0
    return lengths


def test_settings_travel_with_the_checkpoint(tmp_path):
    model = prune(tiny_model(), PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), positions="keep"))
    model.save_pretrained(tmp_path)
    opened = LlavaNextForConditionalGeneration.from_pretrained(tmp_path)
    assert opened.config.pruning["layers"] == [2, 4]
    assert opened.config.pruning["positions"] == "keep"
    assert not is_pruned(opened)


@pytest.mark.parametrize("name", [*METHODS, "none"])
def test_a_string_is_the_name_of_a_method(name):
    """Whatever was saved with the model."""
    model = tiny_model()
    model.config.pruning = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)).settings()
    method = method_of(prune(model, name))
    assert method == method_from_settings({"method": name})
    assert method is None or method.name == name


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("saved", PyramidDrop(layers=(2,), keep=(0.5,))),
        ({"method": "fastv", "keep": 0.25}, FastV(keep=0.25)),
        (["visionzip", {"method": "plphp"}], method_from_settings({"method": ["visionzip", "plphp"]})),
        ({"method": "none"}, None),
        (None, None),
    ],
)
def test_what_stands_for_a_method(asked, expected):
    model = tiny_model()
    model.config.pruning = PyramidDrop(layers=(2,), keep=(0.5,)).settings()
    assert method_of(prune(model, asked)) == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("fastvv", "method='fastvv' is unknown; did you mean fastv?"),
        ("FastV", "did you mean fastv?"),
        ("Saved", "did you mean saved?"),
        ("", "method='' is unknown"),
        (PyramidDrop, r"method=PyramidDrop is a class; pass an instance: PyramidDrop\(\)"),
        ({"keep": 0.5}, r"has no key 'method'; for example \{'method': 'fastv'\}"),
        ({}, "has no key 'method'"),
        ({"method": "fastv", "kep": 0.5}, "'kep' is not a setting of fastv; did you mean keep?"),
        ({"method": "none", "keep": 0.5}, "none takes no settings"),
        ({"method": "saved"}, r"means the method that a checkpoint was saved with .*prune\(model, 'saved'\)"),
        ([], "list at least one method"),
        ([FastV()], "entry 1 of the method list, FastV.* has no method name"),
        (0.5, "method=0.5 is not a pruning method"),
        (True, "method=True is not a pruning method"),
    ],
)
def test_what_is_no_method_is_refused(asked, message):
    model = tiny_model()
    model.config.pruning = PyramidDrop(layers=(2,), keep=(0.5,)).settings()
    with pytest.raises(ValueError, match=message):
        prune(model, asked)
    assert not is_pruned(model)
    del model.config.pruning
    with pytest.raises(ValueError, match="has no pruning settings"):
        prune(model, "saved")


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
    with pytest.raises(ValueError, match="already pruned"):
        prune(model, PyramidDrop())
    unprune(model)
    with pytest.raises(ValueError, match="not pruned"):
        unprune(model)


def test_what_a_pruned_model_cannot_do_is_said():
    made, _ = inputs()
    model = prune(tiny_model(), PyramidDrop())
    with pytest.raises(ValueError, match="output_hidden_states"):
        model(**made, output_hidden_states=True)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(ValueError, match=r"got . images|[Ii]mage tokens|Image features"):
        model(**{**made, "pixel_values": made["pixel_values"][:2], "image_sizes": made["image_sizes"][:2]})
    with pytest.raises(ValueError, match="position_ids must number"):
        model(**made, position_ids=torch.zeros_like(made["input_ids"]))
    with pytest.raises(ValueError, match="row 2 of the batch has no token"):
        model(**{**made, "attention_mask": made["attention_mask"] * torch.tensor([[1], [1], [0]])})


def made_only():
    made, _ = inputs()
    return dict(made)


def test_positional_inputs():
    made = made_only()
    model = prune(tiny_model().eval(), PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)))
    given = (made["input_ids"], made["pixel_values"], made["image_sizes"], made["attention_mask"])
    assert torch.equal(model(*given).logits, model(**made).logits)
    assert torch.equal(model.model(*given).last_hidden_state, model.model(**made).last_hidden_state)
    text = model.model.language_model
    ids, mask = torch.tensor([[5, 6, 7], [3, 5, 6]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    assert torch.equal(text(ids, mask).last_hidden_state, text(input_ids=ids, attention_mask=mask).last_hidden_state)
    assert not torch.equal(text(ids, mask).last_hidden_state, text(ids).last_hidden_state)


def test_evaluation_in_inference_mode_before_a_training_step():
    made, labels = inputs()
    model = prune(tiny_model(), PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)))
    with torch.inference_mode():
        model(**made, labels=labels)
    model(**made, labels=labels).loss.backward()


def test_threads_do_not_see_each_others_calls():
    model = prune(tiny_model().eval(), PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)))
    processor = tiny_processor()
    calls = [dict(processor(text=[text], return_tensors="pt")) for text in ("what is a dog ?", "a red")] * 10
    calls[::2] = [made_only()] * 10
    with torch.no_grad(), ThreadPoolExecutor(2) as pool:
        expected = [model(**call).logits for call in calls]
        got = list(pool.map(lambda call: model(**call).logits.detach(), calls))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_a_copied_config_does_not_run_silently():
    model = prune(tiny_model(), PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)))
    with pytest.raises(ValueError, match="its config was copied from a pruned model"):
        LlavaNextForConditionalGeneration(model.config)(**made_only())


def test_attention_set_after_prune_is_refused():
    model = prune(tiny_model(), PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation of this pruned model was changed to 'sdpa'"):
        model(**made_only())


def test_pickling_is_refused(tmp_path):
    model = prune(tiny_model(), PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)))
    with pytest.raises(pickle.PicklingError, match="use save_pretrained"):
        torch.save(model, tmp_path / "model.pt")


def test_a_failed_call_leaves_nothing_behind():
    made = made_only()
    model = prune(tiny_model().eval(), PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)))
    before = model(**made).logits
    with pytest.raises(ValueError):
        model(**{**made, "pixel_values": made["pixel_values"][:1], "image_sizes": made["image_sizes"][:1]})
    assert torch.equal(model(**made).logits, before)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_dense_is_the_model_with_its_own_attention(name, attention):
    """To the last bit: states, attention weights and generated tokens."""
    model = family_model(name)
    model.set_attn_implementation(attention)
    inputs = family_inputs(name, [["user :", 0, "what is shown here ? assistant"], ["a red ?"]])

    def outputs():
        with torch.no_grad():
            made = model(**inputs, output_hidden_states=True, output_attentions=attention == "eager")
            return [
                made.logits,
                *made.hidden_states,
                *(made.attentions or ()),
                model.generate(**inputs, max_new_tokens=3, do_sample=False),
                model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=2),
            ]

    expected = outputs()
    prune(model, PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), positions="keep"))
    with dense(model):
        assert all(torch.equal(a, b) for a, b in zip(expected, outputs(), strict=True))
    unprune(model)
    assert model.model.language_model.config._attn_implementation == attention
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs(), strict=True))


def test_submodules_are_there_without_an_import_of_their_own():
    code = "import vtprune_train; assert vtprune_train.pruning.PyramidDrop is vtprune_train.PyramidDrop"
    subprocess.run([sys.executable, "-c", code], check=True)
