"""An attention function in a file outside the package: called in training, padded calls and generation."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.support.families import BATCH, family_inputs, family_model
from tests.support.runner import Runs, assert_same_metrics
from vtprune_train import PyramidDrop, prune, unprune
from vtprune_train.config.errors import ConfigError
from vtprune_train.config.load import load_config

ATTENTION = '''
"""Explicit softmax in float64 over the keys of each segment."""

import torch

CALLS = []


def slow(q_THD, k_TGD, v_TGD, *, segment_lengths, scaling, key_lengths=None, sliding_window=None, **kwargs):
    assert not kwargs.get("dropout") and sliding_window is None
    CALLS.append(segment_lengths)
    out, q_start, k_start = [], 0, 0
    group = q_THD.shape[1] // k_TGD.shape[1]
    for length, keys in zip(segment_lengths, key_lengths or segment_lengths, strict=True):
        q = q_THD[q_start : q_start + length].double()
        k, v = (x[k_start : k_start + keys].double().repeat_interleave(group, 1) for x in (k_TGD, v_TGD))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scaling
        hidden = torch.ones(length, keys, dtype=torch.bool).triu(keys - length + 1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v))
        q_start, k_start = q_start + length, k_start + keys
    return torch.cat(out).to(q_THD.dtype)


def records(*args, **kwargs):
    """The package's own, and a line for each process that called it."""
    from vtprune_train.models.forward.attention import varlen_sdpa

    with open(__file__ + ".calls", "a") as file:
        print("called", file=file)
    return varlen_sdpa(*args, **kwargs)


def no_keywords(q_THD, k_TGD, v_TGD):
    return q_THD


VALUE = 3
'''
METHOD = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("attention") / "user_attention.py"
    file.write_text(ATTENTION)
    return f"{file}:slow"


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_it_gives_the_numbers_of_varlen_sdpa(path, name):
    inputs = family_inputs(name, BATCH)
    results = []
    for attention in ("varlen_sdpa", path):
        model = prune(family_model(name), METHOD, attention=attention)
        if attention == path:
            sys.modules["user_attention"].CALLS.clear()
        logits = model(**inputs).logits
        logits.sum().backward()
        if attention == path:
            num_layers = len(model.model.language_model.layers)
            assert len(sys.modules["user_attention"].CALLS) == num_layers, "once a layer, in the decoder only"
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        grad = next(layer.self_attn.q_proj.weight.grad for layer in model.model.language_model.layers)
        results.append((logits.detach(), grad, answer))
        if attention == path:
            assert len(sys.modules["user_attention"].CALLS) == 2 * num_layers, "generation prefills by it"
            unprune(model)
            model(**inputs)
            assert len(sys.modules["user_attention"].CALLS) == 2 * num_layers, "the dense model does not use it"
    (logits, grad, answer), (user_logits, user_grad, user_answer) = results
    assert torch.allclose(user_logits, logits, atol=1e-4) and torch.equal(user_answer, answer)
    assert torch.allclose(user_grad, grad, atol=1e-3 * float(grad.abs().max()))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_keywords", "cannot be called as an attention function"),
        ("VALUE", "cannot be called as an attention function"),
        ("slwo", "does not define slwo; did you mean slow?"),
    ],
)
def test_what_is_no_attention_function_is_refused(path, name, reason):
    with pytest.raises(ValueError, match=rf"attention='\S+:{name}'.*{reason}"):
        prune(family_model("llava"), METHOD, attention=path.replace(":slow", f":{name}"))


def test_a_wrong_name_in_the_settings_is_refused():
    with pytest.raises(ConfigError, match=r"did you mean varlen_sdpa\?.*file.py:function"):
        load_config("quickstart.yaml", ["model.attention=varlen_spda"])


@pytest.mark.slow
def test_training_calls_it(path, tmp_path):
    runs = Runs(tmp_path)
    own = ("run.stop_after=2", "data.workers=0", "deepspeed=configs/deepspeed/zero0.json")
    runs.run("package", "model.attention=varlen_sdpa", *own)
    runs.run("user", f"model.attention={path.replace(':slow', ':records')}", *own)
    assert_same_metrics(runs.metrics("package"), runs.metrics("user"))
    file = path.replace(":slow", ".calls")
    with open(file) as calls:  # noqa: PTH123
        assert calls.read().splitlines().count("called") >= 2 * 4, "each layer of each step"
    said = runs.run("wrong", f"model.attention={path.replace(':slow', ':slwo')}", *own, expect=2).stderr
    assert "model.attention=" in said and "did you mean slow?" in said
