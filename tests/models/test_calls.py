"""What plain transformers takes in ``forward`` and ``generate`` is taken alike with nothing dropped, for every family,
or refused by name."""

import copy
import io
import pickle
import re
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

from tests.support.families import FAMILIES, SPECIAL, family_inputs, family_model, tokenizer
from tests.support.runner import ROOT
from vtprune_train import PyramidDrop, dense, is_pruned, prune, unprune

pytestmark = pytest.mark.slow

ALL = PyramidDrop(layers=(2, 4), keep=(1.0, 1.0))
HALF = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25))
BATCH = [["user :", 0, "what is shown here ? assistant"], ["a", 1, "red", 2, "blue"], ["what is a dog ?"]]
ONE = BATCH[:1]
QWEN = [name for name in FAMILIES if name.startswith("qwen")]
HYBRID = [name for name in FAMILIES if name.startswith("qwen3_5")]
SIZED = [name for name in FAMILIES if name in ("llava_next", "llava_onevision")]


def answer_labels(model, inputs):
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    return labels.masked_fill(labels == model.config.image_token_id, -100)


def positions(inputs):
    return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def features(model, inputs):
    keys = [key for key in ("pixel_values", "image_sizes", "image_grid_thw") if key in inputs]
    return model.get_image_features(**{key: inputs[key] for key in keys}, return_dict=True)


def forward(model, inputs, **more):
    with torch.no_grad():
        output = model(**{**inputs, **more})
    if isinstance(output, tuple):
        return [part for part in output if isinstance(part, torch.Tensor)]
    return [part for part in (output.loss, output.logits) if part is not None]


def generate(model, inputs, **settings):
    settings = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": list(range(len(SPECIAL))), **settings}
    torch.manual_seed(0)
    output = model.generate(**{**inputs, **settings})
    if isinstance(output, torch.Tensor):
        return [output]
    parts = [output.sequences, *(output.get("scores") or ()), *(output.get("logits") or ())]
    return parts if output.get("sequences_scores") is None else [*parts, output.sequences_scores]


def without(inputs, *keys):
    return {key: value for key, value in inputs.items() if key not in keys}


FORWARD = {
    "as it is": lambda m, n, i: forward(m, i),
    "return_dict=False": lambda m, n, i: forward(m, i, return_dict=False)[:1],
    "logits_to_keep=2": lambda m, n, i: forward(m, i, logits_to_keep=2),
    "logits_to_keep, a tensor": lambda m, n, i: forward(m, i, logits_to_keep=torch.tensor([-3, -1])),
    "use_cache": lambda m, n, i: forward(m, i, use_cache=True),
    "labels": lambda m, n, i: forward(m, i, labels=answer_labels(m, i)),
    "labels and a cache": lambda m, n, i: forward(m, i, labels=answer_labels(m, i), use_cache=True),
    "labels as short as the logits": lambda m, n, i: forward(
        m, i, labels=answer_labels(m, i)[:, -5:], logits_to_keep=5
    ),
    "labels, all ignored": lambda m, n, i: forward(m, i, labels=torch.full_like(i["input_ids"], -100))[1:],
    "num_items_in_batch": lambda m, n, i: forward(m, i, labels=answer_labels(m, i), num_items_in_batch=7),
    "shift_labels": lambda m, n, i: forward(m, i, labels=answer_labels(m, i), shift_labels=shifted(m, i)),
    "a mask of bool": lambda m, n, i: forward(m, i, attention_mask=i["attention_mask"].bool()),
    "a mask of floats": lambda m, n, i: forward(m, i, attention_mask=i["attention_mask"].float()),
    "no mask": lambda m, n, i: forward(m, without(i, "attention_mask")),
    "ids of int32": lambda m, n, i: forward(m, i, input_ids=i["input_ids"].int()),
    "text": lambda m, n, i: forward(m, family_inputs(n, BATCH[2:])),
    "pixel_values=None": lambda m, n, i: forward(m, {**family_inputs(n, BATCH[2:]), "pixel_values": None}),
    "float64 pixels": lambda m, n, i: forward(m, i, pixel_values=i["pixel_values"].double()),
    "features made before": lambda m, n, i: forward(
        m, without(i, "pixel_values"), mm_encoder_outputs={"image": features(m, i)}
    ),
    "the base": lambda m, n, i: [m.model(**i).last_hidden_state],
    "the decoder": lambda m, n, i: [m.model.language_model(input_ids=torch.tensor([[14, 15]])).last_hidden_state],
    "a cache of two turns": lambda m, n, i: two_turns(m, n),
    "gradient checkpointing": lambda m, n, i: training_step(m, i),
}


@pytest.mark.parametrize("shape", ["rows", "parts", "one row for all", "one row of parts for all"])
@pytest.mark.parametrize("name", QWEN)
def test_positions_of_any_form_are_taken(name, shape):
    inputs = family_inputs(name, [BATCH[0], BATCH[0]])
    made = positions(inputs) // 2
    given = {
        "rows": made, "parts": made.expand(3, -1, -1), "one row for all": made[:1],
        "one row of parts for all": made[:1].expand(3, -1, -1),
    }[shape]  # fmt: skip
    plain = forward(family_model(name), inputs, position_ids=given)
    counted = forward(family_model(name), inputs, position_ids=positions(inputs))
    assert (plain[0] - counted[0]).abs().max() > 0.1
    close(forward(prune(family_model(name), ALL), inputs, position_ids=given), plain, inputs["attention_mask"].bool())


@pytest.mark.parametrize("name", QWEN)
def test_samples_in_one_row_are_refused(name):
    """Where transformers tells them apart by a part of the positions that counts each one's tokens."""
    inputs = without(family_inputs(name, ONE), "attention_mask")
    model, length = family_model(name), inputs["input_ids"].shape[1]
    count = torch.arange(length)
    parts = count.expand(4, 1, -1)
    twice = {key: torch.cat([value, value], dim=value.ndim - 1) for key, value in inputs.items() if value.ndim == 2}
    twice |= {key: torch.cat([inputs[key], inputs[key]]) for key in ("pixel_values", "image_grid_thw")}
    twice |= {"position_ids": torch.cat([parts, parts], dim=2), "use_cache": False}
    plain = forward(model, inputs, position_ids=parts, use_cache=False)[0]
    if name not in HYBRID:  # transformers' linear attention goes on from the first sample
        torch.testing.assert_close(forward(model, twice)[0][:, length:], plain, atol=3e-4, rtol=1e-3)
    prune(model, ALL)
    torch.testing.assert_close(forward(model, inputs, position_ids=parts)[0], plain, atol=3e-4, rtol=1e-3)
    with pytest.raises(ValueError, match=r"position_ids must number .*several samples packed into one row"):
        forward(model, twice)


def shifted(model, inputs):
    return torch.nn.functional.pad(answer_labels(model, inputs), (0, 1), value=-100)[:, 1:].contiguous()


def new_cache(model, name):
    """Hybrid models need a cache that knows which layers have a state."""
    return DynamicCache(config=model.config) if name in HYBRID else DynamicCache()


def two_turns(model, name):
    cache = new_cache(model, name)
    first, second = family_inputs(name, [["user", 0, "what ?"]]), torch.tensor([[14, 15, 16]])
    mask = {"attention_mask": torch.cat([first["attention_mask"], torch.ones_like(second)], dim=1)}
    with torch.no_grad():
        one = model(**first, past_key_values=cache, use_cache=True)
        # Qwen's models cannot take the whole mask in a later turn.
        two = model(input_ids=second, past_key_values=cache, use_cache=True, **({} if name in QWEN else mask))
        three = model(input_ids=second[:, :1], past_key_values=cache, use_cache=True)
    return [one.logits, two.logits, three.logits]


def training_step(model, inputs):
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**inputs, labels=answer_labels(model, inputs)).loss
    loss.backward()
    return [loss.detach(), next(model.model.language_model.layers[0].mlp.parameters()).grad]


def close(ours, plain, real):
    """At real tokens; padding holds different things by design."""
    assert len(ours) == len(plain) > 0
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        if not mine.is_floating_point():
            assert torch.equal(mine, theirs)
            continue
        if mine.ndim == 3 and mine.shape[:2] == real.shape:
            mine, theirs = mine[real], theirs[real]
        torch.testing.assert_close(mine, theirs, atol=6e-4, rtol=1e-3)


# What transformers' own Qwen models fail at; before 5.18 all families at a language model that assists, and InternVL's
# tiles are mixed up where a row is repeated.
PLAIN_FAILS = (
    "ids of int32", "guidance", "a negative prompt", "a language model assists", "image tokens said, assisted",
)  # fmt: skip
STATEFUL_FAILS = ("prompt lookup", "image tokens said, in lookup", "a dense model assists")  # assisted generation
BEFORE_5_18 = not hasattr(GenerationMixin, "_expand_multimodal_outputs")


def plain_fails(name, case):
    if name in HYBRID and case in STATEFUL_FAILS:
        return True
    return case in PLAIN_FAILS and (name in QWEN or (BEFORE_5_18 and "assist" in case))


def is_mixed_up(name, case):
    return BEFORE_5_18 and name == "internvl" and any(word in case for word in ("beams", "several"))


@pytest.mark.parametrize("case", FORWARD)
@pytest.mark.parametrize("name", FAMILIES)
def test_forward(name, case):
    inputs = family_inputs(name, BATCH)
    if plain_fails(name, case):
        with pytest.raises((RuntimeError, ValueError)):
            FORWARD[case](family_model(name), name, inputs)
        return
    real = inputs["attention_mask"].bool()
    if case == "no mask" and name in QWEN:
        inputs = family_inputs(name, ONE)  # padding would be counted
        real = inputs["attention_mask"].bool()
    plain = FORWARD[case](family_model(name), name, copy.deepcopy(inputs))
    ours = FORWARD[case](prune(family_model(name), ALL), name, copy.deepcopy(inputs))
    close(ours, plain, real)


SIZES = {
    "lists": lambda sizes: sizes.tolist(),
    "tuples": lambda sizes: [tuple(size) for size in sizes.tolist()],
    "arrays": lambda sizes: list(sizes.numpy()),
    "array": lambda sizes: sizes.numpy(),
    "tensors": lambda sizes: list(sizes),
    "int32": lambda sizes: sizes.int(),
}


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("method", [ALL, {"method": "visionzip", "keep": 0.5}], ids=["pyramiddrop", "visionzip"])
def test_sizes_of_images(name, kind, method):
    inputs = family_inputs(name, BATCH)
    sizes = SIZES[kind](inputs["image_sizes"])
    plain = forward(family_model(name), inputs, image_sizes=sizes)
    model = prune(family_model(name), method)
    expected = forward(model, inputs)
    close(forward(model, inputs, image_sizes=sizes), expected, inputs["attention_mask"].bool())
    if method is ALL:
        close(expected, plain, inputs["attention_mask"].bool())
    single = family_inputs(name, ONE)
    given = {**single, "image_sizes": SIZES[kind](single["image_sizes"])}
    assert torch.equal(generate(model, given)[0], generate(model, single)[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_image_features_as_a_tuple(name):
    inputs = family_inputs(name, ONE)
    keys = [key for key in ("pixel_values", "image_sizes", "image_grid_thw") if key in inputs]
    made = [
        model.model.get_image_features(**{key: inputs[key] for key in keys}, return_dict=False)
        for model in (family_model(name), prune(family_model(name), ALL))
    ]
    assert type(made[0]) is type(made[1]) is tuple and len(made[0]) == len(made[1])
    torch.testing.assert_close(made[0][0], made[1][0])


def test_short_labels_rank_as_long_ones():
    """With dropping: the row before the answer ranks, wherever the logits begin."""
    model, inputs = prune(family_model("llava_next"), HALF), family_inputs("llava_next", ONE)
    labels = answer_labels(model, inputs)
    whole = forward(model, inputs, labels=labels)
    for kept in (5, torch.arange(inputs["input_ids"].shape[1])[-5:]):
        short = forward(model, inputs, labels=labels[:, -5:], logits_to_keep=kept)
        torch.testing.assert_close(short[0], whole[0])
        assert torch.equal(short[1], whole[1][:, -5:])
    shift = shifted(model, inputs)
    torch.testing.assert_close(forward(model, inputs, labels=labels, shift_labels=shift)[0], whole[0])
    assert torch.equal(forward(model, inputs, shift_labels=shift)[0], whole[1])
    with pytest.raises(ValueError, match=r"labels of shape \(1, 3\) do not match input_ids of .* logits_to_keep=5"):
        forward(model, inputs, labels=labels[:, -3:], logits_to_keep=5)


class Say(LogitsProcessor):
    """Makes a random model say these tokens first."""

    def __init__(self, prompt, words):
        self.prompt, self.words = prompt, words

    def __call__(self, ids, scores):
        scores = scores.clone()
        scores[:, : len(SPECIAL)] -= 1000
        said = ids.shape[1] - self.prompt
        if said < len(self.words):
            scores[:, self.words[said]] += 3000
        return scores


def saying(inputs, words):
    return LogitsProcessorList([Say(inputs["input_ids"].shape[1], words)])


def language_model(proposes=20):
    """One that proposes so many tokens at once. Plain transformers refuses image tokens among the first."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, pad_token_id=3, eos_token_id=None)).eval()
    model.generation_config.num_assistant_tokens = proposes
    return model


def image_words(model, name):
    """The prompt's words before its image, and the image token in the middle of others."""
    inputs = family_inputs(name, ONE)
    ids = inputs["input_ids"][0].tolist()
    first = ids.index(model.config.image_token_id)
    return inputs, ids[max(first - 3, 0) : first], [20, model.config.image_token_id, 21, model.config.image_token_id]


def repeats_the_prompt(model, name, inputs):
    one, before, _ = image_words(model, name)
    settings = {"suppress_tokens": None, "max_new_tokens": 12, "logits_processor": saying(one, before)}
    return generate(model, one, **settings, prompt_lookup_num_tokens=5)


def says_image_tokens(model, name, **more):
    one, _, image = image_words(model, name)
    return generate(model, one, suppress_tokens=None, max_new_tokens=12, logits_processor=saying(one, image), **more)


class Heard:
    def __init__(self):
        self.tokens = []

    def put(self, tokens):
        self.tokens.append(tokens.flatten())

    def end(self):
        self.tokens.append(torch.tensor([-1]))


def streamed(model, name):
    heard = Heard()
    return [*generate(model, family_inputs(name, ONE), streamer=heard), torch.cat(heard.tokens)]


def sampled_by_hand(model, input_ids, **kwargs):
    return GenerationMixin._sample(model, input_ids, **kwargs)


def generated_twice(model, name):
    cache, first = new_cache(model, name), family_inputs(name, [["user", 0, "what ?"]])
    said = generate(model, first, past_key_values=cache, max_new_tokens=4)[0]
    ids = torch.cat([said, torch.tensor([[14, 15, 16]])], dim=1)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}
    return generate(model, more, max_new_tokens=4)


def config(**settings):
    return GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=3, **settings)


GENERATE = {
    "greedy": lambda m, n, i: generate(m, i),
    "sampling": lambda m, n, i: generate(m, i, do_sample=True, temperature=1.3, top_k=9, top_p=0.9, min_p=0.01),
    "several answers": lambda m, n, i: generate(m, family_inputs(n, ONE), do_sample=True, num_return_sequences=2),
    "beams": lambda m, n, i: generate(m, family_inputs(n, ONE), num_beams=3),
    "beams, sampled": lambda m, n, i: generate(m, family_inputs(n, ONE), num_beams=2, do_sample=True),
    "beams with scores": lambda m, n, i: generate(
        m, family_inputs(n, ONE), num_beams=3, num_return_sequences=2, return_dict_in_generate=True, output_scores=True
    ),
    "no cache": lambda m, n, i: generate(m, i, use_cache=False),
    "scores and logits": lambda m, n, i: generate(
        m, i, return_dict_in_generate=True, output_scores=True, output_logits=True
    ),
    "processors": lambda m, n, i: generate(
        m, i, repetition_penalty=1.5, no_repeat_ngram_size=2, bad_words_ids=[[15]], sequence_bias={(16,): 2.0}
    ),
    "guidance": lambda m, n, i: generate(m, i, guidance_scale=1.5),
    "a negative prompt": lambda m, n, i: generate(
        m, i, guidance_scale=1.5, negative_prompt_ids=torch.full((3, 90), 15)
    ),
    "ends": lambda m, n, i: generate(m, i, eos_token_id=[15, 16, 17, 18]),
    "stopping": lambda m, n, i: generate(
        m, i, stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(i["input_ids"].shape[1] + 3)])
    ),
    "allowed tokens": lambda m, n, i: generate(m, i, prefix_allowed_tokens_fn=lambda row, ids: [15, 16, 17, 20]),
    "streamed": lambda m, n, i: streamed(m, n),
    "custom_generate": lambda m, n, i: generate(m, i, custom_generate=sampled_by_hand),
    "a mask of bool": lambda m, n, i: generate(m, i, attention_mask=i["attention_mask"].bool()),
    "no mask": lambda m, n, i: generate(m, without(i, "attention_mask")),
    "ids by position": lambda m, n, i: [m.generate(i["input_ids"], config(), **without(i, "input_ids"))],
    "inputs=": lambda m, n, i: generate(m, {**without(i, "input_ids"), "inputs": i["input_ids"]}),
    "two turns": lambda m, n, i: generated_twice(m, n),
    "text": lambda m, n, i: generate(m, family_inputs(n, BATCH[2:])),
    "no input": lambda m, n, i: [m.generate(bos_token_id=1, max_new_tokens=4, do_sample=False)],
    "prompt lookup": lambda m, n, i: repeats_the_prompt(m, n, i),
    "image tokens said": lambda m, n, i: says_image_tokens(m, n),
    "image tokens said, in lookup": lambda m, n, i: says_image_tokens(m, n, prompt_lookup_num_tokens=4),
    "image tokens said, in beams": lambda m, n, i: says_image_tokens(m, n, num_beams=2),
    "a language model assists": lambda m, n, i: generate(m, family_inputs(n, ONE), assistant_model=language_model()),
    "image tokens said, assisted": lambda m, n, i: says_image_tokens(m, n, assistant_model=language_model(1)),
    "a dense model assists": lambda m, n, i: generate(m, family_inputs(n, ONE), assistant_model=family_model(n, 1)),
    "training mode": lambda m, n, i: generate(m.train(), i),
}


@pytest.mark.parametrize("case", GENERATE)
@pytest.mark.parametrize("name", FAMILIES)
def test_generate(name, case):
    inputs = family_inputs(name, BATCH)
    if plain_fails(name, case):
        with pytest.raises((RuntimeError, ValueError)):
            GENERATE[case](family_model(name), name, inputs)
        return
    if is_mixed_up(name, case):
        with pytest.raises(ValueError, match=r"transformers>=5\.18"):
            GENERATE[case](prune(family_model(name), ALL), name, inputs)
        return
    plain = GENERATE[case](family_model(name), name, copy.deepcopy(inputs))
    close(GENERATE[case](prune(family_model(name), ALL), name, copy.deepcopy(inputs)), plain, torch.zeros(0, 0))


@pytest.mark.parametrize("name", FAMILIES)
def test_generate_with_gradient_checkpointing(name, caplog):
    """In training mode transformers' layers fill no cache then, and its own ``generate`` shows every step the last
    token alone. Here the answer is the model's."""
    inputs = family_inputs(name, BATCH)
    model = prune(family_model(name), HALF)
    text = family_inputs(name, BATCH[2:])
    expected, beams = generate(model, inputs), generate(model, text, num_beams=2)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(generate(model, inputs)[0], expected[0])
    assert torch.equal(generate(model, text, num_beams=2)[0], beams[0])
    assert caplog.text.count("runs without a cache") == 1
    for key, value in {"past_key_values": DynamicCache(), "prompt_lookup_num_tokens": 3}.items():
        with pytest.raises(ValueError, match=rf"{key} needs a cache, .*gradient_checkpointing_disable"):
            generate(model, family_inputs(name, ONE), **{key: value})
    with pytest.raises(ValueError, match="past_key_values in training mode with gradient checkpointing"):
        model(**inputs, past_key_values=DynamicCache())
    for layer in model.model.language_model.layers[1:]:
        layer.gradient_checkpointing = False
    assert torch.equal(generate(model, inputs)[0], expected[0]), "one layer alone"
    assert torch.equal(generate(model.eval(), inputs)[0], expected[0])


class Asks(LogitsProcessor):
    """Calls the model about something else at every step."""

    def __init__(self, run):
        self.run, self.heard = run, []

    def __call__(self, ids, scores):
        self.heard.append(self.run())
        return scores


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "internvl"])
def test_a_processor_that_calls_the_model_gets_what_it_gets_outside(name, use_cache):
    model, inputs = prune(family_model(name), HALF), family_inputs(name, ONE)
    other = family_inputs(name, [["a", 1, "red", 2, "blue . what is shown here ? assistant"]])
    said = generate(model, inputs, use_cache=use_cache)[0]
    for run in (lambda: forward(model, other)[0], lambda: generate(model, other, max_new_tokens=2)[0]):
        expected, asks = run(), Asks(run)
        heard = generate(model, inputs, use_cache=use_cache, logits_processor=LogitsProcessorList([asks]))[0]
        assert torch.equal(heard, said) and len(asks.heard) == 8
        assert all(torch.equal(one, expected) for one in asks.heard)


def greedy_by_hand(model, input_ids, **kwargs):
    """A loop of one's own, which prepares nothing."""
    inputs = {key: kwargs[key] for key in ("pixel_values", "image_sizes", "mm_encoder_outputs") if key in kwargs}
    for _ in range(8):
        scores = model(input_ids=input_ids, **inputs, use_cache=False).logits[:, -1]
        scores[:, : len(SPECIAL)] = -torch.inf
        input_ids = torch.cat([input_ids, scores.argmax(-1, keepdim=True)], dim=1)
    return input_ids


def test_a_loop_of_ones_own_ranks_by_the_prompt():
    model, inputs = prune(family_model("llava_next"), HALF), family_inputs("llava_next", ONE)
    assert torch.equal(generate(model, inputs, custom_generate=greedy_by_hand)[0], generate(model, inputs)[0])


def test_the_prompt_is_known_beside_inputs_of_none():
    """Without a cache every step ranks by the end of the prompt, wherever ``generate`` is given it."""
    model, inputs = prune(family_model("llava_next"), HALF), family_inputs("llava_next", ONE)
    inputs = {key: value for key, value in inputs.items() if key != "attention_mask"}
    expected = generate(model, inputs, use_cache=False)
    assert torch.equal(generate(model, {"inputs": None, **inputs}, use_cache=False)[0], expected[0])


def masked_inside(model, name):
    ids = torch.tensor([[14, 15, 16, 17, 18]])
    return model(input_ids=ids, attention_mask=torch.tensor([[1, 1, 0, 1, 1]])).logits[0, [0, 1, 3, 4]]


@pytest.mark.parametrize("name", FAMILIES)
def test_masked_columns_inside_a_row_take_no_position(name):
    model = prune(family_model(name), ALL)
    with torch.no_grad():
        torch.testing.assert_close(masked_inside(model, name), model(torch.tensor([[14, 15, 17, 18]])).logits[0])


def test_effective_settings_are_read_wherever_they_stand():
    """By keyword, in a config given by keyword or position, or in the model's own beside another."""
    model, inputs = prune(family_model("llava_next"), HALF), family_inputs("llava_next", ONE)
    static = config(cache_implementation="static")
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        model.generate(inputs["input_ids"], static, **without(inputs, "input_ids"))
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        model.generate(**inputs, generation_config=static)
    model.generation_config.prefill_chunk_size = 4
    with pytest.raises(ValueError, match="prefill_chunk_size=4"):
        model.generate(**inputs, generation_config=config())
    assert torch.equal(
        model.generate(**inputs, generation_config=config(), prefill_chunk_size=None)[:, :4], inputs["input_ids"][:, :4]
    )


def refused(run):
    """The text of the refusal when a pruned LLaVA-NeXT is called by ``run(model, inputs)``."""
    model, inputs = prune(family_model("llava_next"), HALF), family_inputs("llava_next", ONE)
    with pytest.raises((ValueError, pickle.PicklingError)) as refusal:
        run(model, inputs)
    return str(refusal.value)


def dense_cache(model, inputs):
    cache = DynamicCache()
    with dense(model), torch.no_grad():
        model(**inputs, past_key_values=cache)
    return cache


def text_alone(inputs):
    return without(inputs, "pixel_values", "image_sizes")


# Every row of the table in docs/generation.md: calls that meet it, and what the refusal names.
REFUSED = {
    "`inputs_embeds`": [
        (lambda m, i: m(inputs_embeds=torch.zeros(1, 4, 32)), "input_ids"),
        (lambda m, i: m.generate(inputs_embeds=torch.zeros(1, 4, 32), max_new_tokens=2), "input_ids"),
        (lambda m, i: m.generate(i["input_ids"], inputs_embeds=torch.zeros(1, 4, 32)), "does not take inputs_embeds"),
    ],
    "image tokens in a prompt without `pixel_values`, or in `negative_prompt_ids`": [
        (lambda m, i: m(**text_alone(i)), "pass pixel_values"),
        (lambda m, i: generate(m, text_alone(i)), "pass pixel_values"),
        (lambda m, i: generate(m, i, guidance_scale=2.0, negative_prompt_ids=i["input_ids"]), "negative_prompt_ids"),
    ],
    "`prefill_chunk_size`": [(lambda m, i: generate(m, i, prefill_chunk_size=4), "prefill_chunk_size=4")],
    "`cache_implementation` other than dynamic, `StaticCache`, offloaded, quantized and encoder-decoder caches": [
        *(
            (lambda m, i, kind=kind: generate(m, i, cache_implementation=kind), f"cache_implementation='{kind}'")
            for kind in ALL_CACHE_IMPLEMENTATIONS
            if kind not in ("dynamic", "hybrid")
        ),
        (
            lambda m, i: m(**i, past_key_values=StaticCache(config=m.config.get_text_config(), max_cache_len=99)),
            "StaticCache",
        ),
        (
            lambda m, i: m(**i, past_key_values=DynamicCache(config=m.config.get_text_config(), offloading=True)),
            "offloaded",
        ),
        (
            lambda m, i: m(**i, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache())),
            "EncoderDecoderCache",
        ),
    ],
    'continuous batching: `generate_batch`, `init_continuous_batching`, `cache_implementation="paged"`': [
        (lambda m, i: m.generate_batch([[15, 16]], generation_config=config()), "generate_batch is not supported"),
        (lambda m, i: m.init_continuous_batching(), "init_continuous_batching is not supported"),
        (lambda m, i: m.continuous_batching_context_manager().__enter__(), "continuous batching"),
        (lambda m, i: generate(m, i, cache_implementation="paged"), "cache_implementation='paged'"),
    ],
    "a cache filled by a dense model or by another method; in a dense model, a cache filled by a pruned model": [
        (lambda m, i: m(torch.tensor([[14]]), past_key_values=dense_cache(m, i)), "of a dense model"),
        (
            lambda m, i: follow_up(m, i, lambda: prune(unprune(m), ALL)),
            r"keep=\(0.5, 0.25\).* this one is pruned by .*1.0",
        ),
        (lambda m, i: follow_up(m, i, lambda: prune(unprune(m), None)), "this one is pruned by None"),
        (lambda m, i: follow_up(m, i, lambda: unprune(m)), "filled by a pruned model.* a dense model cannot use it"),
    ],
    "a cache in training mode with gradient checkpointing": [
        (lambda m, i: m(**i, past_key_values=recomputed(m)), "gradient_checkpointing_disable"),
        (lambda m, i: generate(m, i, past_key_values=recomputed(m)), "gradient_checkpointing_disable"),
        (lambda m, i: (recomputed(m), generate(m, i, prompt_lookup_num_tokens=2)), "gradient_checkpointing_disable"),
    ],
    "`output_hidden_states`, `output_attentions`": [
        (lambda m, i: m(**i, output_hidden_states=True), "output_hidden_states"),
        (lambda m, i: m(**i, output_attentions=True), "output_attentions"),
        (lambda m, i: generate(m, i, output_attentions=True), "output_attentions"),
        (lambda m, i: asked_by_config(m)(**i), r"output_hidden_states \(set in the config\)"),
    ],
    "`position_ids` that do not count each row's tokens, `cu_seq_lens_q`": [
        (lambda m, i: m(**i, cu_seq_lens_q=torch.tensor([0, 4, 9])), "cu_seq_lens_q .several samples"),
        (lambda m, i: m(**i, position_ids=torch.zeros_like(i["input_ids"])), "position_ids must number"),
    ],
    "PEFT's `adapter_names`, activated LoRA (`alora_invocation_tokens`)": [
        (lambda m, i: adapted(m)(**i, adapter_names=["default"]), r"adapter_names: .*set_adapter"),
        (lambda m, i: generate(adapted(m), i, adapter_names=["default"]), r"adapter_names: .*set_adapter"),
        (lambda m, i: adapted(m, alora_invocation_tokens=[14])(**i), "does not take alora_offsets"),
    ],
    "a pruned `assistant_model`": [(lambda m, i: generate(m, i, assistant_model=m), "assistant_model is pruned")],
    "pickling (`torch.save(model)`), `torch.nn.DataParallel`": [
        (lambda m, i: torch.save(m, io.BytesIO()), "use save_pretrained"),
        (lambda m, i: m._replicate_for_data_parallel(), "DataParallel"),  # what it calls, with several GPUs
    ],
    "`torch.jit.trace`, `torch.export`": [
        (lambda m, i: torch.jit.trace(m, (i["input_ids"],), strict=False), "cannot be traced or exported"),
        (lambda m, i: torch.export.export(m, (), dict(i), strict=False), "cannot be traced or exported"),
    ],
    "an attention mask with more than two dimensions, or a mapping of masks": [
        (lambda m, i: m(**{**i, "attention_mask": torch.ones(1, 1, 9, 9)}), r"not \(1, 1, 9, 9\)"),
        (lambda m, i: m(**{**i, "attention_mask": {"full_attention": None}}), "not dict"),
    ],
    "a row without tokens, `input_ids` without rows, `attention_mask` or `labels` of another shape": [
        (lambda m, i: m(**{**i, "attention_mask": torch.zeros_like(i["attention_mask"])}), "row 0 of the batch has no"),
        (
            lambda m, i: m(**wider(i)),
            r"attention_mask of shape \(1, \d+\) does not match inputs of .*one column for each token",
        ),
        (lambda m, i: generate(m, wider(i)), "does not match inputs of"),
        (lambda m, i: m(**{**i, "attention_mask": i["attention_mask"][:, 1:]}), "does not match inputs of"),
        (lambda m, i: m(torch.tensor([14, 15])), r"input_ids must have the shape \[rows, length\], not \(2,\)"),
        (lambda m, i: m(**i, labels=i["input_ids"][:, 1:]), "do not match input_ids"),
    ],
    "an attention implementation set after `prune`": [
        (lambda m, i: (m.set_attn_implementation("sdpa"), m(**i)), "was changed to 'sdpa'")
    ],
}


def asked_by_config(model):
    model.config.text_config.output_hidden_states = True
    return model


def follow_up(model, inputs, between):
    """A second turn on the cache of the first, of a model that was changed in between."""
    cache = DynamicCache()
    model(**inputs, past_key_values=cache)
    between()
    return model(torch.tensor([[14]]), past_key_values=cache)


def adapted(model, **settings):
    return get_peft_model(model, LoraConfig(r=4, target_modules=["up_proj"], task_type="CAUSAL_LM", **settings)).eval()


def wider(inputs):
    """With a mask that has columns without tokens."""
    return {**inputs, "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 2))}


def recomputed(model):
    """An empty cache, for a model that is now in training mode with gradient checkpointing."""
    model.train()
    model.gradient_checkpointing_enable()
    return DynamicCache()


def listed_refusals():
    text = (ROOT / "docs" / "generation.md").read_text().partition("## Unsupported arguments")[2]
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [re.split(r" \| ", row.strip("| "), maxsplit=1)[0] for row in rows]


def test_the_list_of_refusals_is_complete():
    assert listed_refusals() == list(REFUSED)


@pytest.mark.parametrize("row", REFUSED)
def test_refused_by_name(row):
    for run, named in REFUSED[row]:
        assert re.search(named, refused(run)), (row, named)


def compiled_step(model, inputs, call):
    model.zero_grad()
    output = call(**inputs, labels=answer_labels(model, inputs))
    output.loss.backward()
    return output.loss.item(), model.lm_head.weight.grad.norm().item()


def compile_attribute(name):
    def compiled(model):
        model.get_submodule(name).compile(backend="eager")
        return model

    return compiled


COMPILED = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "model.compile": compile_attribute(""),
    "the base": compile_attribute("model"),
    "the decoder": compile_attribute("model.language_model"),
    "every layer": lambda model: (
        [layer.compile(backend="eager") for layer in model.model.language_model.layers] and model
    ),
}


@pytest.mark.parametrize("way", COMPILED)
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_torch_compile_gives_the_eager_numbers(name, way, caplog):
    torch._dynamo.reset()
    inputs = family_inputs(name, BATCH)
    model = prune(family_model(name), HALF)
    expected, said = compiled_step(model, inputs, model), generate(model, inputs)
    call = COMPILED[way](model)
    assert compiled_step(model, inputs, call) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(generate(call, inputs)[0], said[0])
    assert caplog.text.count("torch.compile around a whole pruned model") == (way != "every layer")


def test_a_compiled_model_is_pruned_and_unpruned():
    """Also where the dense model was compiled and has run."""
    torch._dynamo.reset()
    model, inputs = family_model("llava_next"), family_inputs("llava_next", ONE)
    call = torch.compile(model, backend="eager")
    plain = compiled_step(model, inputs, call)
    assert prune(call, HALF) is call and is_pruned(call) and is_pruned(model)
    dropped = compiled_step(model, inputs, call)
    assert dropped[0] != pytest.approx(plain[0], rel=1e-4)
    assert dropped == pytest.approx(compiled_step(model, inputs, model), rel=1e-5)
    unprune(call)
    assert compiled_step(model, inputs, call) == pytest.approx(plain, rel=1e-5)


def test_a_tower_compiled_before_is_refused_where_its_attention_is_read():
    torch._dynamo.reset()
    model, inputs = family_model("llava_next"), family_inputs("llava_next", ONE)
    model.model.vision_tower.compile(backend="eager")
    forward(model, inputs)
    with pytest.raises(
        ValueError, match=r"could not be read: a tower that was compiled by torch\.compile .*compile_layers"
    ):
        forward(prune(model, "visionzip"), inputs)
    unprune(model)
    forward(prune(model, HALF), inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_autocast(name):
    """As mixed-precision Trainers call it."""
    inputs, losses = family_inputs(name, BATCH), []
    for model in (family_model(name), prune(family_model(name), ALL), prune(family_model(name), HALF)):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(**inputs, labels=answer_labels(model, inputs)).loss)
        losses[-1].backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-2)
    assert abs(losses[2] - losses[0]) > abs(losses[1] - losses[0])


def test_wrapped_models_are_refused():
    with pytest.raises(ValueError, match="cannot prune a DataParallel: call prune before wrapping the model"):
        prune(torch.nn.DataParallel(family_model("llava_next")), HALF)


class Asked(PyramidDrop):
    """Keeps the layouts that it is asked to plan."""

    asked: ClassVar[list] = []

    def plan(self, segments, num_layers):
        self.asked[:] = segments
        return super().plan(segments, num_layers)


def ranking_row(run):
    run()
    (segment,) = Asked.asked
    return segment.query_offsets


# Parts of a row, an image being a number, and which of them a collator leaves supervised ("s").
SUPERVISED = {
    "everything": (["user :", 0, "what is shown ?", "assistant :", "yes ."], "s.sss"),
    "all text behind the image": (["user :", 0, "what is shown ?", "assistant :", "yes ."], "..sss"),
    "the question, not the header": (["what is", 0, "shown ?", "assistant :", "yes ."], "s.s.s"),
    "an image at the end of the prompt": (["user :", "what is", 0, "assistant :", "yes ."], "ss.ss"),
    "two images": (["user :", 0, "and", 1, "what ?", "assistant :", "yes ."], "s.s.sss"),
}
MASKED = {
    "the prompt": (["user :", 0, "what is shown ?", "assistant :", "yes ."], "....s"),
    "turns": (
        ["user :", 0, "what ?", "assistant :", "yes .", "user :", 1, "here ?", "assistant :", "no"],
        "....s....s",
    ),
    "an image in a later turn": (
        ["user : what ?", "assistant :", "yes .", "user : here", 0, "?", "assistant :", "no"],
        "..s....s",
    ),
    "no image": (["user : what ?", "assistant :", "yes ."], "sss"),
    "nothing": (["user :", 0, "what ?", "assistant :", "yes ."], "....."),
}


def with_labels(name, parts, marks):
    """A row and its labels; image tokens and what marks an image are masked, as collators do."""
    inputs = family_inputs(name, [parts])
    special = set(tokenizer().convert_tokens_to_ids(SPECIAL))
    words = [(part.split(), mark) for part, mark in zip(parts, marks, strict=True) if isinstance(part, str)]
    wanted = iter("".join(mark * len(part) for part, mark in words))
    ids = inputs["input_ids"][0].tolist()
    labels = [token if token not in special and next(wanted) == "s" else -100 for token in ids]
    return inputs, torch.tensor([labels])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("case", [*SUPERVISED, *MASKED])
def test_labels_that_supervise_the_prompt_are_warned_about(name, case, caplog):
    """Where they do not, the row that ranks is generation's."""
    parts, marks = {**SUPERVISED, **MASKED}[case]
    inputs, labels = with_labels(name, parts, marks)
    model = prune(family_model(name).train(), Asked(layers=(2, 4), keep=(0.5, 0.25)))
    trained = ranking_row(lambda: model(**inputs, labels=labels))
    model(**inputs, labels=labels)
    assert caplog.text.count("labels supervise text right after an image") == (case in SUPERVISED)
    if case == "the prompt":
        prompt = family_inputs(name, [parts[:-1]])
        assert ranking_row(lambda: generate(model.eval(), prompt, max_new_tokens=1)) == trained


def test_a_dense_run_is_not_warned(caplog):
    parts, marks = SUPERVISED["everything"]
    inputs, labels = with_labels("llava", parts, marks)
    prune(family_model("llava").train(), None)(**inputs, labels=labels)
    assert "labels supervise text" not in caplog.text
