"""The loss of padded rows, computed from the supervised rows alone, is transformers' own."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers.loss.loss_utils import ForCausalLMLoss

from tests.support.families import family_inputs, family_model
from vtprune_train import PyramidDrop, dense, pack, prune, unprune
from vtprune_train.models.forward import head

ROWS = [[0, "what is shown here ? assistant :"], ["a red", 1, "and", 2, "two ? assistant :"], ["what is a dog ?"]]
HALF = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25))


@pytest.fixture
def rows_in_softmax(monkeypatch):
    """The number of rows of every cross-entropy."""
    rows, run = [], F.cross_entropy

    def spy(source, *args, **kwargs):
        rows.append(len(source))
        return run(source, *args, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", spy)
    return rows


def labelled(supervised=3):
    inputs = family_inputs("llava_next", ROWS)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, : labels.shape[1] - supervised] = -100
    return {**inputs, "labels": labels}


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("more", [{}, {"num_items_in_batch": 17}, {"num_items_in_batch": torch.tensor(17)}], ids=str)
def test_loss_and_gradients(rows_in_softmax, more):
    model, inputs = prune(family_model("llava_next"), HALF), labelled()
    output = model(**inputs, **more)
    output.loss.backward()
    found = gradients(model)
    expected = ForCausalLMLoss(output.logits.detach(), inputs["labels"], 64, **more)
    assert rows_in_softmax == [9, inputs["labels"].numel()]
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    # A loss on the logits themselves, as in distillation, has its gradients too.
    ForCausalLMLoss(model(**inputs, **more).logits, inputs["labels"], 64, **more).backward()
    whole = gradients(model)
    assert found.keys() == whole.keys()
    for name, gradient in whole.items():
        assert torch.allclose(found[name], gradient, atol=1e-6 + 1e-5 * gradient.abs().max()), name


def test_labels_of_images_and_no_labels_at_all():
    model, inputs = pack(family_model("llava_next")), labelled()
    everything = model(**{**inputs, "labels": inputs["input_ids"]}).loss
    assert everything.isfinite()
    inputs["labels"][:] = -100
    assert model(**inputs).loss.isnan(), "a mean over nothing, as in transformers"
    loss = model(**inputs, num_items_in_batch=5).loss
    loss.backward()
    assert loss == 0 and model.lm_head.weight.grad.abs().sum() == 0


def test_shortened_labels_use_the_whole_loss(rows_in_softmax):
    model, inputs = pack(family_model("llava_next")), labelled()
    whole = model(**inputs).loss
    short = model(**{**inputs, "labels": inputs["labels"][:, -8:]}, logits_to_keep=8).loss
    assert rows_in_softmax == [9, 24]
    assert short.item() == pytest.approx(whole.item(), rel=1e-5)


def test_adapters_on_the_head(rows_in_softmax):
    model = pack(family_model("llava_next"))
    expected = model(**labelled()).loss
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False))
    loss = adapted(**labelled()).loss
    loss.backward()
    assert rows_in_softmax == [9, labelled()["labels"].numel()]
    assert loss != expected, "the adapter counts"


def test_the_users_loss_function_stays(rows_in_softmax):
    model = family_model("llava_next")
    model.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 5
    assert pack(model)(**labelled()).loss == 5
    assert unprune(model)(**labelled()).loss == 5
    model = pack(family_model("llava_next"))
    assert model.loss_function is head.supervised_loss
    with dense(model):
        model(**labelled())
    assert rows_in_softmax == [labelled()["labels"].numel()]
    assert unprune(model).loss_function is ForCausalLMLoss
