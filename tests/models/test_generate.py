"""``generate`` on a pruned model: beams, sampling, streaming, turns on one cache; against runs without a cache."""

import pytest
import torch
from transformers import DynamicCache, GenerationMixin, TextStreamer

from tests.support.conversations import two_turns
from tests.support.families import SPECIAL, family_inputs, family_model, family_processor, images_repeated, tokenizer
from tests.support.helpers import tiny_model
from vtprune_train import PyramidDrop, dense, prune
from vtprune_train.models.forward.padded import kept_tokens

HALF = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25))
BATCH_OF_8 = [
    [0, "what is shown here ? assistant :"],
    ["a red", 1, "and", 2, "two ? assistant :"],
    ["what is a dog ? assistant :"],
    [3, 0, "left ? yes"],
    ["user", 2, "right ?"],
    ["on the left"],
    [1, "and", 0, "and", 3, "round ? no"],
    [0, "what is shown here ? assistant :"],
]
METHODS = [
    HALF,
    PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), positions="keep"),
    PyramidDrop(layers=(1, 3, 5), keep=(0.6, 0.3, 0.1), rank_with="this_layer"),
]


def generate(model, inputs, **settings):
    settings = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": list(range(len(SPECIAL))), **settings}
    with torch.no_grad():
        return model.generate(**inputs, **settings)


def new_tokens(model, inputs, **settings):
    return generate(model, inputs, **settings)[:, inputs["input_ids"].shape[1] :]


def without_a_cache(model, inputs, steps):
    """[steps] greedy tokens of one row: the whole row again for every token, ranked by the prompt's last token.

    The labels are the model's own way of naming the ranking row: the one before the first supervised token.
    """
    prompt = inputs["input_ids"].shape[1]
    ids, tokens = inputs["input_ids"], []
    for _ in range(steps):
        labels = torch.full_like(ids, -100)
        labels[:, prompt:] = ids[:, prompt:]
        mask = torch.ones_like(ids)
        extra = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, **extra).logits[0, -1]
        logits[: len(SPECIAL)] = -torch.inf
        tokens.append(int(logits.argmax()))
        ids = torch.cat([ids, torch.tensor([[tokens[-1]]])], dim=1)
    return tokens


@pytest.mark.parametrize("method", METHODS, ids=["renumber", "keep", "this_layer"])
@pytest.mark.parametrize("text_type", ["llama", "mistral", "qwen2"])
def test_a_batch_of_8_equals_8_single_runs(method, text_type):
    model = tiny_model(text_type=text_type).eval()
    model.generation_config.pad_token_id = 3
    plain = [new_tokens(model, family_inputs("llava_next", [text]))[0] for text in BATCH_OF_8]
    prune(model, method)
    singles = [new_tokens(model, family_inputs("llava_next", [text]))[0] for text in BATCH_OF_8]
    for side in ("left", "right"):
        batched = new_tokens(model, family_inputs("llava_next", BATCH_OF_8, side))
        assert torch.equal(batched, torch.stack(singles)), side
    assert any(not torch.equal(a, b) for a, b in zip(plain, singles, strict=True)), "dropping changed nothing"
    assert len({tuple(row.tolist()) for row in singles}) > 3
    for text, tokens in zip(BATCH_OF_8[:3], singles, strict=False):
        assert without_a_cache(model, family_inputs("llava_next", [text]), 8) == tokens.tolist()


@pytest.mark.parametrize("window", [7, 40])
def test_sliding_windows(window):
    """Mistral's layers see the last tokens of their stage only; with nothing dropped that is transformers' own."""
    model = tiny_model(text_type="mistral", sliding_window=window).eval()
    model.generation_config.pad_token_id = 3
    inputs = family_inputs("llava_next", BATCH_OF_8)
    plain = new_tokens(model, inputs)
    prune(model, PyramidDrop(layers=(2, 4), keep=(1.0, 1.0)))
    assert torch.equal(new_tokens(model, inputs), plain)
    with dense(model):
        pass
    pruned = tiny_model(text_type="mistral", sliding_window=window).eval()
    prune(pruned, HALF)
    for row, text in enumerate(BATCH_OF_8[:3]):
        own = family_inputs("llava_next", [text])
        assert without_a_cache(pruned, own, 8) == new_tokens(pruned, own)[0].tolist(), row


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"num_beams": 4, "length_penalty": 0.5, "num_return_sequences": 2}]
)
def test_beam_search(name, settings):
    """With the cache as without, for a batch with images and text-only rows."""
    model = prune(family_model(name), HALF)
    inputs = family_inputs(name, BATCH_OF_8[:3])
    with images_repeated(model):
        cached = new_tokens(model, inputs, **settings)
        assert torch.equal(cached, new_tokens(model, inputs, use_cache=False, **settings))
        assert not torch.equal(cached[:: settings.get("num_return_sequences", 1)], new_tokens(model, inputs))


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_sampling(name):
    """Same seed, batch 1: the cache makes no difference, and another seed does."""
    model = prune(family_model(name), HALF)
    inputs = family_inputs(name, BATCH_OF_8[1:2])
    drawn = []
    for seed, use_cache in ((1, True), (1, False), (2, True)):
        torch.manual_seed(seed)
        drawn.append(new_tokens(model, inputs, do_sample=True, temperature=1.5, use_cache=use_cache).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_return_sequences_share_a_prompt():
    model = prune(family_model("llava_next"), HALF)
    inputs = family_inputs("llava_next", BATCH_OF_8[1:3])
    with images_repeated(model):
        torch.manual_seed(0)
        drawn = new_tokens(model, inputs, do_sample=True, num_return_sequences=3)
        torch.manual_seed(0)
        assert torch.equal(drawn, new_tokens(model, inputs, do_sample=True, num_return_sequences=3, use_cache=False))


def test_beams_over_one_image_a_row():
    """What transformers before 5.18 repeats rightly: a row has one image or none."""
    model = prune(family_model("llava_next"), HALF)
    inputs = family_inputs("llava_next", [["a red", 1, "cat ?"], ["what is a dog ?"], [3, "left ?"]])
    cached = new_tokens(model, inputs, num_beams=3)
    assert torch.equal(cached, new_tokens(model, inputs, num_beams=3, use_cache=False))


def test_rows_of_several_images_are_refused_where_transformers_mixes_them_up(monkeypatch):
    monkeypatch.delattr(GenerationMixin, "_expand_multimodal_outputs", raising=False)
    model = prune(family_model("llava_next"), HALF)
    inputs = family_inputs("llava_next", BATCH_OF_8[:3])
    with pytest.raises(ValueError, match=r"num_return_sequences above 1 with \d images.*in 2 rows.*transformers>=5.18"):
        generate(model, inputs, num_beams=2)


def test_assisted_decoding_gives_the_same_tokens():
    """Prompt lookup verifies several tokens a step and crops the staged cache."""
    model = prune(family_model("llava_next"), HALF)
    inputs = family_inputs("llava_next", [["a red cat a red cat a red", 1, "a red cat a red"]])
    plain = new_tokens(model, inputs, max_new_tokens=24)
    assert torch.equal(new_tokens(model, inputs, max_new_tokens=24, prompt_lookup_num_tokens=3), plain)


def test_streaming(capsys):
    model = prune(family_model("llava_next"), HALF)
    inputs = family_inputs("llava_next", [[0, "what is shown here ?"]])
    words = family_processor("llava_next").tokenizer
    tokens = generate(model, inputs, streamer=TextStreamer(words, skip_prompt=True))
    printed = capsys.readouterr().out
    assert printed.strip() == words.decode(tokens[0, inputs["input_ids"].shape[1] :]).strip() != ""


def turn(model, inputs, cache, **settings):
    return generate(model, inputs, past_key_values=cache, return_dict_in_generate=True, **settings)


@pytest.mark.parametrize("method", METHODS, ids=["renumber", "keep", "this_layer"])
def test_a_second_turn_of_text(method):
    """What the first turn dropped stays dropped: the same as one pass in which the first prompt's end ranks."""
    model = prune(family_model("llava_next"), method)
    first = family_inputs("llava_next", [["user", 1, "what is shown ? assistant :"]])
    cache = DynamicCache()
    answer = turn(model, first, cache).sequences
    lengths = [cache.get_seq_length(layer) for layer in range(6)]
    more = torch.tensor([tokenizer_ids("user : is the dog red ? assistant :")])
    second = torch.cat([answer, more], dim=1)
    inputs = {"input_ids": second, "attention_mask": torch.ones_like(second)}
    tokens = turn(model, inputs, cache, max_new_tokens=5).sequences[0, second.shape[1] :]
    assert [cache.get_seq_length(layer) - length for layer, length in enumerate(lengths)] == [1 + more.shape[1] + 4] * 6

    prompt, ids, expected = first["input_ids"].shape[1], second, []
    for _ in range(5):
        labels = torch.full_like(ids, -100)
        labels[:, prompt:] = ids[:, prompt:]  # one supervised run: its first token's predecessor ranks
        with torch.no_grad():
            logits = model(**{**first, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels=labels).logits
        logits[0, -1, : len(SPECIAL)] = -torch.inf
        expected.append(int(logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[expected[-1]]])], dim=1)
    assert tokens.tolist() == expected


def tokenizer_ids(text):
    words = family_processor("llava_next").tokenizer
    return words(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("method", METHODS, ids=["renumber", "keep", "this_layer"])
def test_a_second_turn_with_a_new_image(name, method):
    """Batched on one cache, with different lengths and padding: the same as row by row; the new image is dropped."""
    model = prune(family_model(name), method)
    firsts = [["user", 0, "what is shown ? assistant :"], ["is the dog red ?"]]
    seconds = [["and", 1, "left ? assistant :"], ["and here", 2, "no ?"]]
    rows = []
    for first, second in zip(firsts, seconds, strict=True):
        rows.append(two_turns(model, name, [first], [second]))
    batched, lengths = two_turns(model, name, firsts, seconds)
    for row, (tokens, _) in enumerate(rows):
        assert torch.equal(batched[row], tokens[0]), row
    assert lengths[-1] < lengths[0]
    nothing = prune(family_model(name), PyramidDrop(layers=(2, 4), keep=(1.0, 1.0), positions=method.positions))
    plain = family_model(name)
    for first, second in zip(firsts, seconds, strict=True):
        if name == "llava_next":  # transformers' own cached turn as the reference
            assert torch.equal(
                two_turns(nothing, name, [first], [second])[0], two_turns(plain, name, [first], [second])[0]
            )


def test_kept_tokens_do_not_depend_on_the_batch():
    model = prune(family_model("llava_next"), HALF)
    together = kept_tokens(model, family_inputs("llava_next", BATCH_OF_8))
    for row, text in enumerate(BATCH_OF_8):
        alone = kept_tokens(model, family_inputs("llava_next", [text]))[0]
        assert [[drop.tolist() for drop in image] for image in alone] == [
            [drop.tolist() for drop in image] for image in together[row]
        ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefill_chunk_size": 4}, "prefill_chunk_size=4 is not supported: a pruned model ranks"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    ],
)
def test_what_generation_cannot_do_is_refused(settings, message):
    model = prune(family_model("llava_next"), HALF)
    with pytest.raises(ValueError, match=message):
        generate(model, family_inputs("llava_next", BATCH_OF_8[:1]), **settings)


def test_a_dense_models_cache_is_refused():
    model = family_model("llava_next")
    inputs = family_inputs("llava_next", BATCH_OF_8[:1])
    cache = DynamicCache()
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    prune(model, HALF)
    with pytest.raises(ValueError, match="tokens of a dense model"):
        model(input_ids=torch.tensor([[14]]), past_key_values=cache)


@pytest.mark.parametrize("positions", ["renumber", "keep"])
def test_keep_dense_keeps_images_in_full_for_later_turns(positions):
    """Every turn on the cache equals a first call with all that was said; in a batch, padded, with a new image."""
    method = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), positions=positions, multi_turn="keep_dense")
    model = prune(family_model("llava_next"), method)
    dropped = prune(family_model("llava_next"), PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), positions=positions))
    firsts = [["user", 0, "what is shown ? assistant :"], ["is the dog red ?"]]
    seconds = [["and", 1, "left ? assistant :"], ["and here", 2, "no ?"]]
    tokens, lengths = two_turns(model, "llava_next", firsts, seconds)
    together = family_inputs("llava_next", [first + second for first, second in zip(firsts, seconds, strict=True)])
    assert torch.equal(new_tokens(dropped, together, max_new_tokens=5), tokens)
    assert not torch.equal(two_turns(dropped, "llava_next", firsts, seconds)[0], tokens)
    whole = DynamicCache()
    turn(dropped, together, whole, max_new_tokens=6)
    # Without what the padding between the turns adds to the first layers.
    assert lengths[-1] == whole.get_seq_length(5)


def test_keep_dense_through_generate_with_answers_between():
    method = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), multi_turn="keep_dense")
    model, cache = prune(family_model("llava_next"), method), DynamicCache()
    first = family_inputs("llava_next", [["user", 1, "what is shown ? assistant :"]])
    answer = turn(model, first, cache).sequences
    second = torch.cat([answer, torch.tensor([tokenizer_ids("user : is the dog red ? assistant :")])], dim=1)
    inputs = {"input_ids": second, "attention_mask": torch.ones_like(second)}
    tokens = turn(model, inputs, cache, max_new_tokens=5).sequences
    assert torch.equal(tokens, generate(model, {**first, **inputs}, max_new_tokens=5))


def test_keep_dense_is_refused_where_positions_are_not_kept():
    with pytest.raises(ValueError, match=r"Qwen2\.5-VL: multi_turn='keep_dense' is not supported"):
        prune(family_model("qwen2_5_vl"), PyramidDrop(keep=(0.5,), multi_turn="keep_dense"))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("turns", [2, 3])
def test_keep_dense_in_padded_batches(side, turns):
    """Rows of different lengths, padded anew in every turn, equal single rows and a first call with everything."""
    method = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), multi_turn="keep_dense")
    said = [
        [["user", 0, "what is shown ? assistant :"], ["is the dog red ?"]],
        [["and", 1, "left ?"], ["and here on the left", 2, "no ? yes"]],
        [["a red cat on the left ?"], ["round ?", 3, "assistant :"]],
    ][:turns]
    model = prune(family_model("llava_next"), method)
    batched = last_logits(model, said, side)
    for row in range(2):
        own = last_logits(model, [[turn_rows[row]] for turn_rows in said], side)
        assert torch.allclose(batched[row], own[0], atol=1e-4), row
        whole = [[[part for turn_rows in said for part in turn_rows[row]]]]
        assert torch.allclose(own, last_logits(model, whole, side), atol=1e-4), row


def last_logits(model, said, side):
    cache, masks = DynamicCache(), []
    for texts in said:
        inputs = family_inputs("llava_next", texts, side)
        masks.append(inputs.pop("attention_mask"))
        with torch.no_grad():
            output = model(**inputs, attention_mask=torch.cat(masks, dim=1), past_key_values=cache, use_cache=True)
    return output.logits[:, -1]


def test_keep_dense_with_assisted_decoding():
    method = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), multi_turn="keep_dense")
    model = prune(family_model("llava_next"), method)
    inputs = family_inputs("llava_next", [["a red cat a red cat a red", 1, "a red cat a red"]])
    plain = new_tokens(model, inputs, max_new_tokens=24)
    assert torch.equal(new_tokens(model, inputs, max_new_tokens=24, prompt_lookup_num_tokens=3), plain)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_text_turn_of_three_part_positions(name):
    """With the mask of the whole conversation, as without one: positions go on where the first turn's ended."""
    plain, model = family_model(name), prune(family_model(name), PyramidDrop(layers=(2, 4), keep=(1.0, 1.0)))
    first = family_inputs(name, [["user", 0, "what is shown ?"]])
    ids = torch.tensor([tokenizer().convert_tokens_to_ids(["and", "the", "left", "?"])])
    mask = torch.cat([first["attention_mask"], torch.ones_like(ids)], dim=1)
    logits = []
    for which, attention_mask in ((plain, None), (model, None), (model, mask)):
        cache = DynamicCache()
        with torch.no_grad():
            which(**first, past_key_values=cache, use_cache=True)
            made = which(input_ids=ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        logits.append(made.logits)
    assert torch.allclose(logits[0], logits[1], atol=1e-4)
    assert torch.allclose(logits[0], logits[2], atol=1e-4)


@pytest.mark.skipif(
    not hasattr(GenerationMixin, "_expand_multimodal_outputs"), reason="this version takes no computed features"
)
def test_features_of_nothing_leave_the_positions_of_a_text_turn():
    """``mm_encoder_outputs`` without features is a text turn, whatever request the model answered before it."""
    model = prune(family_model("qwen2_5_vl"), HALF)
    first = family_inputs("qwen2_5_vl", [["user", 0, "what is shown ?"]] * 2)
    ids = torch.tensor([tokenizer().convert_tokens_to_ids(["and", "the", "left", "?"])] * 2)
    logits = []
    for features in (None, {"image": None, "video": None}):
        cache = DynamicCache()
        with torch.no_grad():
            model(**first, past_key_values=cache, use_cache=True)
            generate(model, family_inputs("qwen2_5_vl", BATCH_OF_8[:3]), max_new_tokens=1)
            made = model(input_ids=ids, past_key_values=cache, use_cache=True, mm_encoder_outputs=features)
        logits.append(made.logits)
    assert torch.equal(*logits)


def test_a_pruned_assistant_is_refused():
    model, assistant = family_model("llava_next"), prune(family_model("llava_next", seed=1), HALF)
    prune(model, HALF)
    with pytest.raises(ValueError, match="assistant_model is pruned"):
        generate(model, family_inputs("llava_next", BATCH_OF_8[:1]), assistant_model=assistant)
