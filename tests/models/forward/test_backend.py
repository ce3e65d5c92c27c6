"""The attention kernel is chosen again when a trainer moves or casts the model after ``prune``."""

import pytest
import torch
from transformers import AttentionInterface

from tests.support.families import family_inputs, family_model
from vtprune_train import PyramidDrop, prune, unprune
from vtprune_train.models.forward import attention, backend
from vtprune_train.models.forward.calls import state_of
from vtprune_train.models.forward.tower_attention import TOWER_PREFIX

ROWS = [[0, "what is shown here ? assistant :"], ["what is a dog ?"]]
HALF = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25))
KERNEL = "varlen_torch"


@pytest.fixture
def calls(monkeypatch):
    """A kernel for bfloat16 only, as on a GPU; returns the dtypes of its calls in the decoder."""
    dtypes = []

    def kernel(q_THD, *args, **kwargs):
        dtypes.append(q_THD.dtype)
        return attention.varlen_sdpa(q_THD, *args, **kwargs)

    def unavailable_because(name, device, dtype, head_dim=None):
        if name == "varlen_sdpa" or (name == KERNEL and dtype == torch.bfloat16):
            return None
        return "is not installed"

    registered = AttentionInterface._global_mapping
    monkeypatch.setitem(attention.FUNCTIONS, KERNEL, kernel)
    monkeypatch.delitem(registered, attention.PREFIX + KERNEL)
    monkeypatch.setitem(registered, TOWER_PREFIX + KERNEL, registered[TOWER_PREFIX + "varlen_sdpa"])
    for module in (attention, backend):
        monkeypatch.setattr(module, "unavailable_because", unavailable_because)
    return dtypes


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_a_model_that_is_cast_after_prune(calls, name):
    model, inputs = prune(family_model(name), HALF), family_inputs(name, ROWS)
    expected = model(**inputs).logits
    assert state_of(model).backend == "varlen_sdpa" and not calls
    found = model.to(torch.bfloat16)(**inputs).logits
    assert calls == [torch.bfloat16] * 6
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    if name == "qwen2_5_vl":
        assert model.model.visual.config._attn_implementation == TOWER_PREFIX + KERNEL
    calls.clear()
    model.float()(**inputs)
    assert state_of(model).backend == "varlen_sdpa" and not calls
    assert unprune(model).model.language_model.config._attn_implementation == "sdpa"


def test_mixed_precision(calls):
    """The weights stay in float32."""
    model, inputs = prune(family_model("llava_next"), HALF), family_inputs("llava_next", ROWS)
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs)
    assert calls == [torch.bfloat16] * 6


def test_the_callers_choice_stays(calls):
    model, inputs = prune(family_model("llava_next"), HALF, attention="varlen_sdpa"), family_inputs("llava_next", ROWS)
    model.to(torch.bfloat16)(**inputs)
    assert state_of(model).backend == "varlen_sdpa" and not calls
