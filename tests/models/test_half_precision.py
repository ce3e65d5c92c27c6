"""Half precision: training computes the positions that ``from_pretrained`` does."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.support.families import FAMILIES, family_inputs, family_model
from tests.support.half_precision import LONG
from tests.support.helpers import tiny_model
from tests.support.runner import ROOT
from vtprune_train import PyramidDrop, prune, unprune
from vtprune_train.config.errors import ConfigError
from vtprune_train.evaluation.answering import load_weights
from vtprune_train.training.engine.start import start_engine
from vtprune_train.training.optimizer import OptimizerSpec

pytestmark = pytest.mark.slow

HALF = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), positions="keep")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("half") / "found.json"
    command = [sys.executable, str(ROOT / "tests" / "support" / "half_precision.py"), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_from_pretrained(measured, family):
    cases = {name: found for name, found in measured.items() if name.partition(" ")[0] == family}
    origins = 4 if family in ("llava", "llava_next") else 2
    engines = 8 if family in ("qwen2_5_vl", "llava_next") else 4
    assert len(cases) == origins + engines, cases
    for name, found in cases.items():
        dtype = "torch.float32" if "float32" in name else "torch.bfloat16"
        assert found["positions"] > 1000 and found["dtype"] == dtype, (name, found)
        assert found["parameters"] == [dtype] and found["buffers"] == [], (name, found)
        assert found["largest_difference"] == 0.0, (name, found)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of every family."""
    folder = tmp_path_factory.mktemp("saved")
    for name in FAMILIES:
        family_model(name).save_pretrained(folder / name)
    return folder


def logits_and_buffers(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits, dict(model.named_buffers())


CASTS = {"to": lambda model: model.to(torch.bfloat16), "half": lambda model: model.half()}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("when", ["before", "after", "and pruned again"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cast_model_computes_what_from_pretrained_does(saved, family, when, cast, caplog):
    """``model.to(dtype)`` rounds the rotary frequencies; a pruned model computes them again."""
    kind, inputs = type(family_model(family)), family_inputs(family, LONG)
    model = kind.from_pretrained(saved / family, dtype=torch.float32)
    if when != "before":
        prune(model, HALF)
    CASTS[cast](model)
    if when == "and pruned again":
        unprune(model)
    if when != "after":
        prune(model, HALF)
    logits, buffers = logits_and_buffers(model, inputs)
    opened = prune(kind.from_pretrained(saved / family, dtype=model.dtype), HALF)
    expected, own = logits_and_buffers(opened, inputs)
    assert torch.equal(logits, expected)
    assert all(buffers[name].dtype == b.dtype and torch.equal(buffers[name], b) for name, b in own.items())
    towers = sum(name.endswith(".inv_freq") for name in own)
    assert caplog.text.count("have been reset to float32") == towers
    assert f"were cast to {model.dtype}" in caplog.text
    logits_and_buffers(model, inputs)
    assert caplog.text.count("have been reset to float32") == towers, "once"


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_cast_to_half_precision_and_back(saved, family, half, caplog):
    """Its frequencies are float32, but rounded; those that somebody changed are left alone."""
    kind, inputs = type(family_model(family)), family_inputs(family, LONG)
    model = kind.from_pretrained(saved / family, dtype=torch.float32).to(half).float()
    logits, buffers = logits_and_buffers(prune(model, HALF), inputs)
    opened = kind.from_pretrained(saved / family, dtype=half).float()
    expected, own = logits_and_buffers(prune(opened, HALF), inputs)
    assert torch.equal(logits, expected)
    assert all(torch.equal(buffers[name], b) for name, b in own.items())
    assert caplog.text.count("were cast to half precision and back") == sum(n.endswith(".inv_freq") for n in own)
    caplog.clear()
    changed = kind.from_pretrained(saved / family, dtype=torch.float32)
    rotary = changed.get_submodule("model.language_model.rotary_emb")
    rotary.inv_freq = rotary.inv_freq / 4
    assert torch.equal(prune(changed, HALF).get_submodule("model.language_model.rotary_emb").inv_freq, rotary.inv_freq)
    assert "reset to float32" not in caplog.text


@pytest.mark.parametrize("rope", ["linear", "llama3", "yarn"])
def test_scaled_frequencies_are_computed_again_as_scaled(rope):
    scaled = {
        "rope_type": rope, "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }  # fmt: skip
    model = tiny_model(rope_parameters=scaled)
    rotary = model.model.language_model.rotary_emb
    before = rotary.inv_freq.clone()
    assert not torch.equal(before, tiny_model().model.language_model.rotary_emb.inv_freq)
    prune(model.bfloat16(), None)(torch.tensor([[5, 6, 7]]))
    assert rotary.inv_freq.dtype == torch.float32 and torch.equal(rotary.inv_freq, before)


@pytest.mark.parametrize("method", ["victor", "voco", "visionselector", "quecc", "pyramiddrop"])
@pytest.mark.parametrize("family", ["llava_next", "llava", "llava_onevision", "qwen2_5_vl"])
def test_saved_and_opened_again(saved, tmp_path, family, method):
    """A pruned bfloat16 model, by plain transformers and by the project's own door."""
    kind, inputs = type(family_model(family)), family_inputs(family, LONG)
    model = prune(kind.from_pretrained(saved / family, dtype=torch.bfloat16), method)
    expected, buffers = logits_and_buffers(model, inputs)
    model.save_pretrained(tmp_path)
    for opened in (kind.from_pretrained(tmp_path, dtype="auto"), load_weights(str(tmp_path), "auto")):
        logits, own = logits_and_buffers(prune(opened), inputs)
        assert torch.equal(logits, expected)
        assert {str(p.dtype) for p in opened.parameters()} == {"torch.bfloat16"}
        assert all(own[name].dtype == b.dtype and torch.equal(own[name], b) for name, b in buffers.items())


def test_an_engine_that_casts_buffers_is_refused(monkeypatch):
    model = nn.Linear(2, 2)
    model.register_buffer("inv_freq", torch.ones(2), persistent=False)

    class Engine:
        module = model

    def initialize(**_):
        model.inv_freq = model.inv_freq.bfloat16()
        return Engine, None, None, None

    monkeypatch.setattr("deepspeed.initialize", initialize)
    with pytest.raises(ConfigError, match=r"cast the buffer inv_freq from torch.float32 to torch.bfloat16"):
        groups = [{"params": list(model.parameters()), "lr": 1.0}]
        start_engine(model, groups, OptimizerSpec("sgd", torch.optim.SGD), {})
