"""Copies of a pruned model: by ``deepcopy``, by its config, and opened by its path as TRL opens a reference model."""

import copy
import json
import pickle

import pytest
import torch
import yaml
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForImageTextToText, LlavaNextForConditionalGeneration

from tests.support.families import FAMILIES, family_inputs, family_model
from vtprune_train import PyramidDrop, dense, is_pruned, prune, unprune
from vtprune_train.models.patch import method_of
from vtprune_train.pruning.methods.victor import Victor

HALF = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25))
PROMPTS = [["user :", 0, "what is shown here ? assistant"]]


def logits(model, name="llava_next"):
    with torch.no_grad():
        return model(**family_inputs(name, PROMPTS)).logits


@pytest.fixture
def folder(tmp_path):
    family_model("llava_next").save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def opened(name):
    return LlavaNextForConditionalGeneration.from_pretrained(name).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_opened_by_a_pruned_models_path_is_pruned_alike(name, tmp_path):
    """And by an equal path of one's own it is dense."""
    family_model(name).save_pretrained(tmp_path / name)
    path = str(tmp_path / name)
    policy = prune(AutoModelForImageTextToText.from_pretrained(path).eval(), HALF)
    reference = type(policy).from_pretrained(policy.config._name_or_path).eval()
    assert method_of(reference) == method_of(policy)
    assert torch.equal(logits(reference, name), logits(policy, name))
    assert method_of(AutoModelForImageTextToText.from_pretrained(policy.name_or_path)) == method_of(policy)
    assert not is_pruned(type(policy).from_pretrained(path))
    assert not is_pruned(AutoModelForImageTextToText.from_pretrained(path))


def test_the_path_of_a_copy_and_of_an_unpruned_model(folder):
    policy = prune(opened(folder), HALF)
    path = policy.config._name_or_path
    second = opened(path)
    third = opened(second.config._name_or_path)
    assert is_pruned(second) and is_pruned(third)
    with_info, info = LlavaNextForConditionalGeneration.from_pretrained(path, output_loading_info=True)
    assert is_pruned(with_info) and not info["missing_keys"]
    assert not is_pruned(opened(unprune(second).config._name_or_path)), "its string is a plain one again"
    assert is_pruned(opened(copy.deepcopy(policy).config._name_or_path))
    unprune(policy)
    assert not is_pruned(opened(policy.config._name_or_path))
    del policy, third
    assert path == folder


def test_the_path_is_a_plain_string(folder):
    """Model cards, adapters' configs and logs write it."""
    path = prune(opened(folder), HALF).config._name_or_path
    assert type(path) is str and json.loads(json.dumps(path)) == folder
    assert yaml.safe_load(yaml.safe_dump({"base_model": path})) == {"base_model": folder}
    assert not is_pruned(opened(pickle.loads(pickle.dumps(path))))


def test_learned_parameters_come_from_the_path_or_are_refused(folder, tmp_path):
    policy = prune(opened(folder), Victor())
    with pytest.raises(ValueError, match=r"victor.*save_pretrained.*ref_model"):
        opened(policy.config._name_or_path)
    policy.save_pretrained(tmp_path / "learned")
    policy = prune(opened(tmp_path / "learned"))
    assert torch.equal(logits(opened(policy.config._name_or_path)), logits(policy))


@pytest.mark.parametrize("method", [HALF, Victor()], ids=["pyramiddrop", "victor"])
def test_deep_copies_and_averages_are_pruned(method):
    model = prune(family_model("llava_next"), method)
    expected = logits(model)
    copied, averaged = copy.deepcopy(model), AveragedModel(model)
    averaged.update_parameters(model)
    assert torch.equal(logits(copied), expected) and torch.equal(logits(averaged), expected)
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight.mul_(2)
    unprune(model)
    assert is_pruned(copied) and torch.equal(logits(copied), expected), "a copy of its own"


def test_a_model_made_from_a_pruned_models_config_is_pruned_too_or_refused():
    plain = family_model("llava_next")
    model = prune(family_model("llava_next"), HALF)
    made = AutoModelForImageTextToText.from_config(copy.deepcopy(model.config)).float().eval()
    made.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"its config was copied from a pruned model; call prune\(model\)"):
        logits(made)
    assert torch.equal(logits(prune(made)), logits(model))
    with dense(made):
        assert torch.equal(logits(made), logits(plain))
    assert torch.equal(logits(unprune(made)), logits(plain))
