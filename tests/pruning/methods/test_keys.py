"""Keys left out of a layer: the mask over later rows, the cache without them, and what the caller sees of it."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from tests.support.families import SPECIAL, family_inputs, family_model, images_repeated
from tests.support.key_choice import TURNS, packed_decoder, random_prompt, spans_of
from tests.support.key_reference import best, masked_forward
from tests.support.packed import Forbid, assert_close, loss_and_grads, pruned, random_batch, random_segment
from vtprune_train import prune
from vtprune_train.core.stream import Drop
from vtprune_train.models.cache import StagedLayer, cache_bytes
from vtprune_train.models.forward.decoder import run_layers
from vtprune_train.models.forward.keys import BlindRows, blind_mask
from vtprune_train.models.forward.padded import decode, prefill
from vtprune_train.models.forward.recompute import checkpoint_activations
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.methods.plphp import PLPHP
from vtprune_train.pruning.methods.zipvl import ZipVL
from vtprune_train.pruning.needs import HiddenAfter, Needs
from vtprune_train.pruning.ops.per_head import keep_best, span_sizes


class ByContent(PruningMethod):
    """Each head keeps the tokens whose keys begin with the largest number: needs no attention, so it is the same in
    whichever call an image arrives."""

    share: float = 0.5
    layers: tuple[int, ...] = (0, 2, 3, 5)
    hidden_after: HiddenAfter = "query"
    keep: float = 1.0

    name = "by_content"

    @property
    def needs(self):
        return Needs(hidden_after=self.hidden_after)

    def drops(self, num_layers):
        return (Drop(3, self.keep),) if self.keep < 1.0 else ()

    def score(self, candidates):
        return candidates.hidden[:, 0].float()

    def key_layers(self, num_layers):
        return self.layers

    def keys(self, layer, ranking, boundary):
        keys = torch.cat([ranking.keys[s.start : s.end] for s in boundary.segments])
        scores = keys.index_select(0, boundary.visual_in_scored)[:, :, 0].T
        sizes = span_sizes(boundary.span_of_visual, len(boundary.spans))
        return keep_best(scores, boundary.span_of_visual, (sizes * self.share).floor().long())


def by_content(spans, groups, share):
    def choose(layer, rows, keys):
        per_group = keys.shape[0] // groups
        return [
            [best({o: keys[g * per_group, o, 0].item() for o in range(s, s + n)}, int(n * share)) for s, n in spans]
            for g in range(groups)
        ]

    return choose


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=4),
    st.sampled_from(["query", "span"]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
)
def test_later_rows_are_blind_to_what_is_left_out(seed, shapes, hidden_after, kv_heads, plain):
    """Several images, several turns, none, grouped queries, batches, projector alignment."""
    rng = np.random.default_rng(seed)
    text_model = packed_decoder(seed, kv_heads=kv_heads)
    method = ByContent(0.4, hidden_after=hidden_after)
    segments = [random_segment(rng, images, turns, plain) for images, turns in shapes]
    embeds = torch.from_numpy(rng.standard_normal((sum(s.length for s in segments), 32)))
    with torch.no_grad():
        output = run_layers(text_model, embeds, method.plan(segments, 6), method)
        expected, start = [], 0
        for segment in segments:
            choose = by_content(spans_of(segment), kv_heads, 0.4)
            own = embeds[start : start + segment.length]
            queries = list(segment.query_offsets)
            expected.append(
                masked_forward(text_model, own, spans_of(segment), queries, method.layers, hidden_after, choose)
            )
            start += segment.length
    assert_close(output.last_hidden_state, torch.cat(expected), largest=1e-4, mean=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
    st.sampled_from(["query", "span"]),
    st.sampled_from([1, 2, 4]),
)
def test_decoding_on_what_is_left_equals_masking(seed, images, hidden_after, kv_heads):
    """The compacted cache of a batch, token after token, against each row alone with everything there but masked."""
    rng = np.random.default_rng(seed)
    text_model = packed_decoder(seed, kv_heads=kv_heads)
    method = ByContent(0.4, hidden_after=hidden_after)
    segments = [random_prompt(rng, n) for n in images]
    embeds = torch.from_numpy(rng.standard_normal((sum(s.length for s in segments), 32)))
    more = torch.from_numpy(rng.standard_normal((len(segments), 3, 32)))
    with torch.no_grad():
        _, _, cache = prefill(text_model, method, embeds, segments)
        widths = [layer.width for layer in cache.layers]
        assert cache.get_seq_length() == max(s.length for s in segments)
        decoded = torch.cat([decode(text_model, method, more[:, i : i + 1], cache) for i in range(3)], dim=1)
        start = 0
        for row, segment in enumerate(segments):
            own = torch.cat([embeds[start : start + segment.length], more[row]])
            choose = by_content(spans_of(segment), kv_heads, 0.4)
            queries = list(segment.query_offsets)
            expected = masked_forward(text_model, own, spans_of(segment), queries, method.layers, hidden_after, choose)
            assert_close(decoded[row], text_model.norm(expected[-3:]), largest=1e-5, mean=1e-6)
            start += segment.length
    left = [sum(s.length - int(s.length * 0.4) for s in segment.spans) for segment in segments]
    for index, width in enumerate(widths):
        gone = left if index in method.layers else [0] * len(segments)
        assert width == max(s.length - n for s, n in zip(segments, gone, strict=True))
    assert [layer.width - width for layer, width in zip(cache.layers, widths, strict=True)] == [3] * 6


def test_a_sliding_window_holds_a_row_and_those_before_it():
    none = torch.zeros(0, dtype=torch.int64)
    blind = BlindRows(segment=0, first=5, end=6, visual=slice(0, 0), columns=none, limits=none)
    seen = blind_mask(blind, torch.ones(1, 0, dtype=torch.bool), 0, 6, sliding_window=3)
    assert seen.tolist() == [[[False, False, False, True, True, True]]]


def test_memory_is_freed_and_keeping_everything_is_dense():
    rng = np.random.default_rng(0)
    text_model = packed_decoder(0)
    segments = [random_prompt(rng, n) for n in (2, 0, 1)]
    embeds = torch.from_numpy(rng.standard_normal((sum(s.length for s in segments), 32)))
    more = torch.from_numpy(rng.standard_normal((3, 1, 32)))
    caches, hidden = [], []
    with torch.no_grad():
        for method in (None, ByContent(1.0), ByContent(0.3)):
            out, _, cache = prefill(text_model, method, embeds, segments)
            caches.append(cache_bytes(cache))
            assert sum(
                tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in (layer.keys, layer.values)
            ) == cache_bytes(cache), "a view holds on to more than it shows"
            hidden.append((out, decode(text_model, method, more, cache)))
    assert all(torch.equal(a, b) for a, b in zip(hidden[0], hidden[1], strict=True))
    assert not torch.equal(hidden[0][1], hidden[2][1])
    assert caches[0] == caches[1] > caches[2]


@pytest.mark.parametrize("hidden_after", ["query", "span"])
def test_activation_checkpointing_meets_the_same_choice(hidden_after):
    segments = [random_segment(np.random.default_rng(i), 2, 2) for i in range(3)]
    method = ByContent(0.4, hidden_after=hidden_after)
    model = pruned(method)
    batch = random_batch(model, segments)
    batch.plan = method.plan(segments, 6)
    plain = loss_and_grads(model, batch)
    checkpoint_activations(model)
    recomputed = loss_and_grads(model, batch)
    assert torch.equal(plain[0], recomputed[0])
    assert all(torch.equal(grad, recomputed[1][name]) for name, grad in plain[1].items())
    dense = ByContent(1.0, hidden_after=hidden_after)
    batch.plan = dense.plan(segments, 6)
    assert not torch.equal(loss_and_grads(pruned(dense), batch)[0], plain[0])


@pytest.mark.parametrize("hidden_after", ["query", "span"])
def test_gradients_are_those_of_the_mask(hidden_after):
    rng = np.random.default_rng(3)
    text_model = packed_decoder(3)
    method = ByContent(0.4, hidden_after=hidden_after)
    segments = [random_segment(rng, images, 3) for images in (2, 0, 3)]
    embeds = torch.from_numpy(rng.standard_normal((sum(s.length for s in segments), 32)))
    weights = torch.from_numpy(rng.standard_normal(embeds.shape))
    ours, theirs = embeds.clone().requires_grad_(), embeds.clone().requires_grad_()
    (run_layers(text_model, ours, method.plan(segments, 6), method).last_hidden_state * weights).sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in text_model.layers.named_parameters()}
    text_model.zero_grad()
    start = 0
    for segment in segments:
        own = slice(start, start + segment.length)
        spans, queries = spans_of(segment), list(segment.query_offsets)
        choose = by_content(spans, 2, 0.4)
        hidden = masked_forward(text_model, theirs[own], spans, queries, method.layers, hidden_after, choose)
        (hidden * weights[own]).sum().backward()
        start += segment.length
    pairs = [(ours.grad, theirs.grad)]
    pairs += [(grads[name], parameter.grad) for name, parameter in text_model.layers.named_parameters()]
    for one, two in pairs:  # transformers' rotary tables are in single precision
        assert_close(one / two.abs().max(), two / two.abs().max(), largest=1e-5, mean=1e-6)


@pytest.mark.parametrize(
    "method", [PLPHP(), ZipVL(), ByContent(0.4, hidden_after="span")], ids=["plphp", "zipvl", "span"]
)
def test_training_never_waits_for_the_device(method):
    segments = [random_segment(np.random.default_rng(i), i, 2) for i in range(4)]
    model = pruned(method)
    batch = random_batch(model, segments)
    batch.plan = method.plan(segments, 6)
    with Forbid():
        assert model(batch).loss_sum is not None


def test_heads_that_keep_different_numbers_are_refused():
    class Uneven(ByContent):
        def keys(self, layer, ranking, boundary):
            kept = super().keys(layer, ranking, boundary).clone()
            kept[0] = True
            return kept

    segment = random_prompt(np.random.default_rng(0), 1)
    with torch.no_grad(), pytest.raises(ValueError, match=r"different heads of layer 0.*keep the same number"):
        prefill(packed_decoder(0), Uneven(0.5), torch.randn(segment.length, 32, dtype=torch.float64), [segment])


METHODS = [ByContent(0.4), ByContent(0.4, hidden_after="span"), ByContent(0.6, keep=0.5), PLPHP(alpha=0.6, beta=0.3)]
IDS = ["query", "span", "after a drop", "plphp"]


def conversation(model, turns, side="left"):
    """[B, V] logits after the last turn and two more tokens, all on one cache; and the cache."""
    cache, masks = DynamicCache(), []
    with torch.no_grad():
        for texts in turns:
            inputs = family_inputs("llava_next", texts, side)
            masks.append(inputs.pop("attention_mask"))
            model(**inputs, attention_mask=torch.cat(masks, dim=1), past_key_values=cache, use_cache=True)
        for token in (14, 20):
            masks.append(torch.ones(len(turns[0]), 1, dtype=torch.int64))
            ids = torch.full((len(turns[0]), 1), token)
            made = model(input_ids=ids, attention_mask=torch.cat(masks, dim=1), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == torch.cat(masks, dim=1).shape[1], "the caller counts all columns given"
    return made.logits[:, -1], cache


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_turns_on_one_cache(method, side):
    """Rows of different lengths with a new image in every turn equal single rows; keys are chosen once for an image."""
    model = prune(family_model("llava_next").double(), method)
    batched, cache = conversation(model, TURNS, side)
    for row in range(2):
        single, _ = conversation(model, [[texts[row]] for texts in TURNS], side)
        assert torch.allclose(batched[row], single[0], atol=1e-8), row
    first: StagedLayer = cache.layers[0]
    assert cache.layers[5].width < first.get_seq_length()


@pytest.mark.parametrize("method", METHODS[:2], ids=IDS[:2])
def test_turns_equal_one_pass_without_a_cache(method):
    """The end of each turn judges what arrived in it; what it left out stays unseen by later turns."""
    model = prune(family_model("llava_next").double(), method)
    first, second = ["user", 0, "what is shown ? assistant :"], ["and", 1, "left ? assistant :"]
    expected, _ = conversation(model, [[first], [second]])
    whole = family_inputs("llava_next", [[*first, *second, "a", "left"]])
    ids = whole["input_ids"]
    ids[0, -2], ids[0, -1] = 14, 20
    one = family_inputs("llava_next", [first])["input_ids"].shape[1]
    two = family_inputs("llava_next", [second])["input_ids"]
    ids = torch.cat([ids[:, :one], two, ids[:, -2:]], dim=1)
    labels = torch.full_like(ids, -100)
    labels[0, one] = ids[0, one]  # the row before each supervised run ranks: the end of each turn
    labels[0, -2:] = ids[0, -2:]
    whole |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        logits = model(**whole, labels=labels, use_cache=False).logits[0, -1]
    assert torch.allclose(logits, expected[0], atol=1e-8)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_generation_with_beams_sequences_and_an_assistant(method):
    """Without a cache every step is a whole pass: other rows than the prompt's last must be blind there too."""
    model = prune(family_model("llava_next"), method)
    suppress = {"suppress_tokens": list(range(len(SPECIAL))), "do_sample": False, "max_new_tokens": 8}
    batch = family_inputs(
        "llava_next", [["a red", 1, "and", 2, "two ? assistant :"], ["what is a dog ?"], [3, "left ?"]]
    )
    one = family_inputs("llava_next", [["a red cat a red cat a red", 1, "a red cat a red"]])
    with torch.no_grad():
        for wanted in ({}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
            with images_repeated(model) if wanted else nullcontext():
                cached = model.generate(**batch, **suppress, **wanted)
                assert torch.equal(cached, model.generate(**batch, **suppress, use_cache=False, **wanted)), wanted
        plain = model.generate(**one, **suppress)
        assert torch.equal(model.generate(**one, **suppress, prompt_lookup_num_tokens=3), plain)


def test_keep_dense_judges_everything_anew():
    model = prune(family_model("llava_next").double(), PLPHP(alpha=0.6, beta=0.3, multi_turn="keep_dense"))
    logits, cache = conversation(model, TURNS[:2])
    for row in range(2):
        together, _ = conversation(model, [[TURNS[0][row] + TURNS[1][row]]])
        assert torch.allclose(logits[row], together[0], atol=1e-8), row
    assert cache.layers[5].width < cache.get_seq_length()


def test_a_layer_that_grows_keeps_room_and_notices_when_it_is_taken_away():
    def layer():
        made, generator = StagedLayer(), torch.Generator().manual_seed(0)
        content = torch.randn(3, 2, 40, 4, generator=generator)
        made.fill(content, content + 1, torch.zeros(3, dtype=torch.int64), False)
        return made

    columns = torch.randn(60, 3, 2, 1, 4)
    grown, expected, copies = layer(), layer().keys, set()
    for step, column in enumerate(columns):
        keys, _ = grown.update(column, column + 1)
        expected = torch.cat([expected, column], dim=2)
        copies.add(keys.data_ptr())
        if step == 20:
            before = keys
            grown.reorder_cache(torch.tensor([2, 0, 0]))
            expected = expected[[2, 0, 0]]
            assert torch.equal(before[[2, 0, 0]], grown.keys)
        if step == 30:
            grown.crop(-4)
            expected = expected[:, :, :-4]
        if step == 40:
            grown.batch_select_indices(torch.tensor([0, 1, 1]))
            expected = expected[[0, 1, 1]]
        assert torch.equal(grown.keys, expected) and torch.equal(grown.values, expected + 1), step
    assert len(copies) < 10
    with torch.inference_mode():
        grown.update(columns[0], columns[0])
    keys, _ = grown.update(columns[0], columns[0])
    assert torch.equal(keys[:, :, -2:], columns[0].expand(-1, -1, 2, -1))
    learned = columns[0].clone().requires_grad_()
    assert grown.update(learned, learned)[0].requires_grad
