"""A policy that drops the tokens which its reference drops (``prune(policy, method, rank_by=...)``)."""

import copy
import gc
from contextlib import contextmanager, nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GenerationMixin, LlavaNextForConditionalGeneration

from tests.support.families import FAMILIES, family_inputs, family_model
from vtprune_train import PyramidDrop, is_pruned, kept_tokens, pack, prune, unprune
from vtprune_train.models.forward import padded
from vtprune_train.models.forward.calls import state_of, unwrapped
from vtprune_train.pruning import METHODS, method_from_settings

HALF = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25))
ROWS = [[0, "what is shown here ? assistant :"], ["a red", 1, "and", 2, "two ? assistant :"], ["what is a dog ?"]]

MERGES, KEYS, LEARNS = "merges tokens", "drops keys in each layer", "trains parameters that select tokens"
REFUSED = {
    **dict.fromkeys(("sparsevlm", "prumerge", "visionzip", "prunevid", "pool"), MERGES),
    **dict.fromkeys(("plphp", "zipvl"), KEYS),
    "tome": "merges tokens inside the vision tower",
    **dict.fromkeys(("videollm_mod", "victor", "voco", "visionselector", "quecc", "prefix", "vistog"), LEARNS),
}


def kept(model, inputs):
    return [tokens.tolist() for row in kept_tokens(model, inputs) for image in row for tokens in image]


def moved(model):
    """Change all weights, so that the model ranks differently."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 * parameter.std(correction=0) + 0.02))
    return model


def pair(name, method=HALF):
    reference = prune(family_model(name), method)
    return reference, prune(moved(family_model(name)), method, rank_by=reference)


def labels_of(inputs, supervised=3):
    labels = inputs["input_ids"].clone()
    labels[:, :-supervised] = -100
    return labels


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_policy_keeps_the_tokens_of_its_reference(name):
    reference, policy = pair(name)
    inputs = family_inputs(name, ROWS)
    expected = kept(reference, inputs)
    assert kept(policy, inputs) == expected
    assert kept(prune(unprune(policy), HALF), inputs) != expected, "its own weights keep other tokens"


@pytest.mark.parametrize("name", list(METHODS))
def test_methods_drop_what_their_reference_drops_or_say_why_not(name):
    inputs, method = family_inputs("llava_next", ROWS), method_from_settings({"method": name})
    reference, policy = prune(family_model("llava_next"), method), moved(family_model("llava_next"))
    reason = REFUSED.get(name)
    with pytest.raises(ValueError, match=reason) if reason else nullcontext():
        assert kept(prune(policy, method, rank_by=reference), inputs) == kept(reference, inputs)


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_the_query_rows_of_the_reference_are_those_of_the_labels(name):
    reference, policy = pair(name)
    inputs = family_inputs(name, ROWS, "right")
    labels = labels_of(inputs, supervised=4)
    origins = []
    with dropping(origins):
        reference(**inputs, labels=labels)
        loss = policy.train()(**inputs, labels=labels).loss
    loss.backward()
    scored, selected, trained = origins
    assert selected == trained == scored
    assert scored != dropped_by(reference, inputs), "other query rows keep other tokens"
    assert all(parameter.grad is None for parameter in reference.parameters())
    assert all(parameter.grad is not None for parameter in policy.model.language_model.parameters())


ENCODES_IN_PREFILL = not hasattr(GenerationMixin, "_expand_multimodal_outputs")


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "internvl", "qwen2_5_vl", "qwen3_5"])
def test_generation_drops_what_the_reference_drops(name):
    reference, policy = pair(name)
    inputs, origins = family_inputs(name, ROWS), []
    with dropping(origins), torch.no_grad():
        policy.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert origins == [dropped_by(reference, inputs)] * 2, "a pass of the reference, and the prefill"


@pytest.mark.skipif(ENCODES_IN_PREFILL, reason="transformers before 5.18 encodes images in the prefill")
@pytest.mark.parametrize("settings", [{}, {"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "internvl", "qwen2_5_vl", "qwen3_5"])
def test_a_shared_prefill_drops_what_the_reference_drops(name, settings):
    reference, policy = pair(name)
    inputs = family_inputs(name, [*ROWS, ROWS[0]])
    origins = []
    with dropping(origins), torch.no_grad():
        policy.generate(**inputs, max_new_tokens=3, **{"do_sample": False, **settings})
    selected, prefilled, *_ = origins
    # The last prompt equals the first one, and shares its prefill.
    assert selected == prefilled == dropped_by(reference, family_inputs(name, ROWS))


def test_generation_infers_the_mask_of_padding():
    reference, policy = pair("llava_next")
    inputs, origins = family_inputs("llava_next", ROWS), []
    expected = dropped_by(reference, inputs)
    del inputs["attention_mask"]
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 3, "eos_token_id": 2}
    with dropping(origins), torch.no_grad():
        policy.generate(**inputs, **settings)
    assert origins == [expected] * 2
    with pytest.raises(ValueError, match="needs input_ids"):
        policy.generate(inputs_embeds=torch.zeros(1, 3, 32), max_new_tokens=1)


def test_dropout_does_not_change_what_the_reference_chooses():
    reference, policy = pair("llava_next")
    inputs, origins = family_inputs("llava_next", ROWS), []
    expected = dropped_by(reference, inputs)
    for layer in reference.model.language_model.layers:
        layer.mlp = nn.Sequential(layer.mlp, nn.Dropout(0.5))
    reference.train()
    with dropping(origins):
        policy(**inputs)
    assert origins == [expected] * 2
    assert all(module.training for module in reference.modules())


@pytest.mark.skipif(ENCODES_IN_PREFILL, reason="transformers before 5.18 encodes images in the prefill")
def test_generation_without_a_cache_says_what_to_change():
    _, policy = pair("llava_next")
    with pytest.raises(ValueError, match="use_cache=True"), torch.no_grad():
        policy.generate(**family_inputs("llava_next", ROWS), max_new_tokens=2, use_cache=False)


@pytest.mark.parametrize("copied", [False, True], ids=["no_adapter", "adapter_of_trl"])
def test_adapters(copied):
    """With PEFT, the reference is the model without its adapter, or with the adapter that TRL adds."""
    inputs = family_inputs("llava_next", ROWS)
    model = get_peft_model(prune(family_model("llava_next"), HALF, rank_by="reference"), lora())
    if copied:
        model.add_adapter("ref", lora())
        torch.manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".ref." in name:
                    parameter.add_(torch.randn_like(parameter))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with use_adapter(model, "ref" if copied else None):
        expected = kept(model, inputs)
    assert trained == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert kept(model, inputs) == expected
    assert trained == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    loss = model.train()(**inputs, labels=labels_of(inputs)).loss
    loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} <= set(trained)
    inner = state_of(unwrapped(model))
    inner.rank_by = None
    assert kept(model, inputs) != expected, "the adapter keeps other tokens"


def test_a_model_loaded_from_the_path_of_the_policy_is_its_reference(tmp_path):
    family_model("llava_next").save_pretrained(tmp_path)
    policy = prune(LlavaNextForConditionalGeneration.from_pretrained(tmp_path), HALF, rank_by="reference")
    inputs = family_inputs("llava_next", ROWS)
    with pytest.raises(ValueError, match="there is no reference model: create the trainer before"):
        policy(**inputs)
    reference = LlavaNextForConditionalGeneration.from_pretrained(policy.config._name_or_path)
    assert kept(moved(policy), inputs) == kept(reference, inputs)
    copied = copy.deepcopy(policy)
    assert kept(copied, inputs) != kept(reference, inputs), "a copy ranks by itself"
    second = LlavaNextForConditionalGeneration.from_pretrained(policy.config._name_or_path)
    assert kept(policy, inputs) == kept(reference, inputs) != kept(moved(second), inputs), "the first one is used"
    del reference
    gc.collect()
    with pytest.raises(ValueError, match="there is no reference model"):
        policy(**inputs)


def test_text_alone_needs_no_reference():
    policy = prune(family_model("llava_next"), HALF, rank_by="reference")
    inputs = family_inputs("llava_next", [["what is a dog ?"]])
    assert policy(**inputs).logits.isfinite().all()


def test_wrong_use():
    model, other = family_model("llava_next"), family_model("llava_next")
    for method, rank_by, message in (
        (None, "reference", "without a method nothing is dropped"),
        (HALF, "self", "rank_by='self' is neither 'reference' nor a model"),
        (HALF, model, "rank_by is the model itself"),
        (HALF, other, "the reference is not pruned"),
        (HALF, prune(family_model("llava_next"), "fastv"), "the reference is pruned by FastV"),
        (HALF, pack(family_model("llava_next")), "the reference is pruned by None"),
        (HALF, prune(family_model("llava"), HALF), "rank_by is a LLaVA-1.5, but the model a LLaVA-NeXT"),
    ):
        with pytest.raises(ValueError, match=message):
            prune(model, method, rank_by=rank_by)
        assert not is_pruned(model)


def test_the_reference_was_unpruned_in_the_meantime():
    reference, policy = pair("llava_next")
    unprune(reference)
    with pytest.raises(ValueError, match="the reference is not pruned"):
        policy(**family_inputs("llava_next", ROWS))


def test_a_failed_pass_of_the_reference_leaves_nothing_behind(monkeypatch):
    reference, policy = pair("llava_next")
    inputs = family_inputs("llava_next", ROWS)
    expected = policy(**inputs).logits
    with monkeypatch.context() as patch:
        patch.setattr(padded, "run_layers", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            policy(**inputs)
    assert torch.equal(policy(**inputs).logits, expected)
    assert reference(**inputs).logits.isfinite().all()


def lora():
    return LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)


@contextmanager
def use_adapter(model, name):
    """As TRL computes the log-probabilities of the reference."""
    if name is None:
        with model.disable_adapter():
            yield
        return
    model.set_adapter(name)
    yield
    model.set_adapter("default")


@contextmanager
def dropping(origins):
    """Append, for each pass with images, the rows that are kept at each drop point."""
    run = padded.run_layers

    def spy(*args):
        output = run(*args)
        if output.selections and len(output.selections[0].chosen):
            origins.append([rows.tolist() for rows in output.origins])
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(padded, "run_layers", spy)
        yield


def dropped_by(model, inputs):
    origins = []
    with dropping(origins), torch.no_grad():
        model(**inputs)
    return origins[0]
