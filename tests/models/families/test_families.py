"""Every family: with nothing dropped it is plain transformers; with dropping, batches equal single rows."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, Gemma3Config, Gemma3ForConditionalGeneration

from tests.support.families import BATCH, FAMILIES, HALF, SPECIAL, family_inputs, family_model
from vtprune_train import PyramidDrop, dense, prune, unprune
from vtprune_train.models.cache import cache_bytes

KEEP_ALL = PyramidDrop(layers=(2, 4), keep=(1.0, 1.0))


def continuation(model, inputs, **settings):
    """[B, new] tokens."""
    special = list(range(len(SPECIAL)))  # an image's placeholder is no answer
    settings = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": special, **settings}
    with torch.no_grad():
        return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", [None, KEEP_ALL], ids=["packed", "keep_all"])
def test_nothing_dropped_is_plain_transformers(name, method):
    model = family_model(name)
    batches = [family_inputs(name, BATCH), *(family_inputs(name, [text]) for text in BATCH)]
    expected = [continuation(model, inputs) for inputs in batches]
    assert len({tuple(row) for row in expected[0].tolist()}) > 1, "the model says the same of everything"
    prune(model, method)
    for inputs, tokens in zip(batches, expected, strict=True):
        assert torch.equal(continuation(model, inputs), tokens)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rank_with", ["next_layer", "this_layer"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_generation_equals_single(name, rank_with, side):
    model = family_model(name)
    plain = continuation(model, family_inputs(name, BATCH))
    prune(model, PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), rank_with=rank_with))
    batched = continuation(model, family_inputs(name, BATCH, side))
    for row, text in enumerate(BATCH):
        assert torch.equal(continuation(model, family_inputs(name, [text]))[0], batched[row]), row
    assert not torch.equal(batched, plain), "dropping changed nothing"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_without_a_cache_the_tokens_are_the_same(name, side):
    model = prune(family_model(name), HALF)
    inputs = family_inputs(name, BATCH, side)
    assert torch.equal(continuation(model, inputs, use_cache=False), continuation(model, inputs))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pruned_model_is_saved_and_opened(name, tmp_path):
    model = family_model(name)
    inputs = family_inputs(name, BATCH)
    before = continuation(model, inputs)
    prune(model, HALF)
    pruned = continuation(model, inputs)
    with dense(model):
        assert torch.equal(continuation(model, inputs), before)
    assert torch.equal(continuation(model, inputs), pruned)
    model.save_pretrained(tmp_path)
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert torch.equal(continuation(opened, inputs), before), "a dense user gets the dense model"
    assert torch.equal(continuation(prune(opened), inputs), pruned), "prune(model) takes the saved settings"
    assert torch.equal(continuation(unprune(model), inputs), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trainer_s_checkpoint_is_loaded_under_its_published_names(name, tmp_path):
    """As a Trainer resumes: the files' tensors into a model made with other weights, unknown names passed over."""
    saved = prune(family_model(name), HALF)
    saved.save_pretrained(tmp_path)
    other = prune(family_model(name, seed=1), HALF)
    if name == "qwen3_5_moe":  # its experts are joined when they are read
        with pytest.raises(ValueError, match="open them with from_pretrained instead"):
            other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
        return
    result = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not result.unexpected_keys
    own = other.state_dict()
    assert all(torch.equal(tensor, own[key]) for key, tensor in saved.state_dict().items())


@pytest.mark.parametrize("name", FAMILIES)
def test_training_step_has_gradients_of_every_part(name):
    """And with nothing dropped they are transformers' own."""
    model = family_model(name).train()
    inputs = family_inputs(name, BATCH, "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :3] = -100
    labels[inputs["input_ids"] == model.config.image_token_id] = -100
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    prune(model, KEEP_ALL)
    packed = model(**inputs, labels=labels).loss
    packed.backward()
    assert abs(packed - loss) < 1e-5
    assert {key for key, p in model.named_parameters() if p.grad is not None} == set(expected)
    # Plain transformers differs as much between left and right padding: the delta rule adds its chunks in float32.
    bound = 2e-3 if name.startswith("qwen3_5") else 2e-4
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = expected[key].abs().max().clamp(min=1)
            assert (parameter.grad - expected[key]).abs().max() < bound * scale, key


def test_the_cache_shrinks_by_stage():
    model = prune(family_model("llava"), HALF)
    inputs = family_inputs("llava", [[0, "what is shown here ? assistant :"]])
    output = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    text = inputs["input_ids"].shape[1] - 16
    lengths = [output.past_key_values.get_seq_length(layer) for layer in range(6)]
    assert lengths == [text + n + 2 for n in (16, 16, 8, 8, 4, 4)]
    assert cache_bytes(output.past_key_values) == sum(lengths) * 2 * 2 * 8 * 4


def test_unsupported_models_are_refused_by_name():
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    text = {**small, "head_dim": 8, "intermediate_size": 16, "vocab_size": 32}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    gemma = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 7}, mm_tokens_per_image=4
        )
    )
    with pytest.raises(ValueError, match="Gemma3ForConditionalGeneration: its image tokens attend to each other"):
        prune(gemma, HALF)
    model = family_model("llava")
    model.model.language_model.config.model_type = "gpt2"
    with pytest.raises(ValueError, match=r"LLaVA-1\.5: language model type 'gpt2' is not supported"):
        prune(model, HALF)
    with pytest.raises(ValueError, match="no pruning settings"):
        prune(family_model("internvl"))
    model = family_model("llava")
    model.model.language_model.config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="rope_type 'longrope' depends on the longest sample"):
        prune(model, HALF)


def test_dynamic_rotary_embeddings_are_default_ones_up_to_the_limit():
    """As InternVL3 has them; longer sequences, whose angles depend on the batch, are refused."""
    texts = [["user : what is", 1, "?"], ["user : a", 2, "red cat ?"]]
    inputs = family_inputs("internvl", texts)
    model = family_model("internvl")
    text = model.model.language_model
    text.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    text.config.max_position_embeddings = inputs["input_ids"].shape[1] + 3
    text.rotary_emb = type(text.rotary_emb)(text.config)
    expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        text.rotary_emb(torch.zeros(1, 1, 1), torch.tensor([[500]]))  # a longer sequence changed the frequencies
    pruned = prune(model, None)
    assert torch.equal(pruned.generate(**inputs, max_new_tokens=3, do_sample=False), expected)
    with pytest.raises(ValueError, match=r"tokens, more than max_position_embeddings=\d+.*set rope_type to yarn"):
        pruned.generate(**inputs, max_new_tokens=9, do_sample=False)
