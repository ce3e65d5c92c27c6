"""Qwen3.5: layers with a recurrent state in packed batches and in the cache, against transformers' own layers."""

import gc
import re
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5.modeling_qwen3_5 import apply_rotary_pos_emb

from tests.support.families import BATCH, family_inputs, family_model, qwen3_5
from vtprune_train import PyramidDrop, prune
from vtprune_train.config.pruning import PruningConfig
from vtprune_train.core.flops import DELTA_CHUNK, DecoderGeometry, VisualTokens
from vtprune_train.core.stream import SegmentLayout
from vtprune_train.models.cache import StagedLayer, StateLayer, cache_bytes, staged
from vtprune_train.models.forward import linear_attention
from vtprune_train.models.forward.decoder import run_layers
from vtprune_train.models.forward.linear_attention import groups_of, padded
from vtprune_train.models.forward.padded import decode, kept_tokens, prefill
from vtprune_train.pruning.attending import check_attending, fitted
from vtprune_train.pruning.combined import Combined
from vtprune_train.pruning.methods.fastv import FastV
from vtprune_train.pruning.methods.feather import Feather
from vtprune_train.pruning.methods.hidrop import HiDrop
from vtprune_train.pruning.methods.plphp import PLPHP
from vtprune_train.pruning.methods.random_tokens import Random
from vtprune_train.pruning.methods.sparsevlm import SparseVLM

PATTERN = (3, 7)  # every fourth layer attends, as published
DROP = PyramidDrop(layers=(3, 7), keep=(0.5, 0.25))


def three_parts(rotary, args, kwargs):
    if "position_ids" in kwargs and kwargs["position_ids"].ndim == 2:
        kwargs["position_ids"] = kwargs["position_ids"].expand(3, -1, -1)
    return args, kwargs


def make(method=None, attending=PATTERN):
    torch.manual_seed(0)
    model = qwen3_5(attending).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
            elif name.endswith("A_log"):
                parameter.copy_(torch.randn(parameter.shape) - 3)  # a state that lasts
            else:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    # Tests of the decoder alone have positions of one part, which transformers 5.17 does not take.
    model.model.language_model.rotary_emb.register_forward_pre_hook(three_parts, with_kwargs=True)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 3
    return model if method is None else prune(model, method)


def text_segments(*lengths):
    return [SegmentLayout(length, (), (length - 1,), ()) for length in lengths]


def plain_decoder(model, embeds_TC, positions=None, layers=slice(None)):
    """[T, C] of one sample through transformers' own layers, with its own causal mask."""
    text = model.model.language_model
    hidden = embeds_TC.unsqueeze(0)
    positions = torch.arange(hidden.shape[1]).expand(3, 1, -1) if positions is None else positions.unsqueeze(1)
    rotary = text.rotary_emb(hidden, positions)
    mask = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()[None, None]
    for index in range(len(text.layers))[layers]:
        attends = index in PATTERN
        hidden = text.layers[index](hidden, position_embeddings=rotary, attention_mask=mask if attends else None)
    return hidden[0]


@pytest.fixture(scope="module")
def plain():
    return make()


@pytest.fixture(scope="module")
def packed():
    return make(DROP)


LENGTHS = (5, 70, 1, 64, 130)  # within a chunk of the delta rule, a whole one, and several


def stream(seed=0, lengths=LENGTHS):
    return torch.randn(sum(lengths), 32, generator=torch.Generator().manual_seed(seed))


def test_packed_layers_are_transformers_layers_sample_by_sample(plain):
    """Outputs and gradients of inputs and weights."""
    model = make("none")
    text, embeds = model.model.language_model, stream()
    ours, theirs = (embeds.clone().requires_grad_() for _ in range(2))
    plan = DROP.plan(text_segments(*LENGTHS), 8)
    out = run_layers(text, ours, plan, DROP).last_hidden_state
    expected = torch.cat([plain_decoder(plain, part) for part in theirs.split(LENGTHS)])
    torch.testing.assert_close(out, expected, atol=2e-4, rtol=1e-4)
    (out * stream(1)).sum().backward()
    (expected * stream(1)).sum().backward()
    assert (ours.grad - theirs.grad).abs().max() < 1e-4 * theirs.grad.abs().max()
    pairs = zip(text.named_parameters(), plain.model.language_model.parameters(), strict=True)
    for (name, parameter), other in pairs:
        if other.grad is not None:
            scale = other.grad.abs().max().clamp(min=1.0)
            assert (parameter.grad - other.grad).abs().max() < 1e-3 * scale, name
    plain.zero_grad()


def test_a_sample_does_not_change_the_others(packed):
    """Not a bit, whether its content or its length changes."""
    text, embeds = packed.model.language_model, stream()
    with torch.no_grad():
        first = run_layers(text, embeds, DROP.plan(text_segments(*LENGTHS), 8), DROP).last_hidden_state
        other = embeds.clone()
        other[5:75] = 100.0
        second = run_layers(text, other, DROP.plan(text_segments(*LENGTHS), 8), DROP).last_hidden_state
        longer = torch.cat([embeds[:5], stream(2, (200,)), embeds[75:]])
        third = run_layers(text, longer, DROP.plan(text_segments(5, 200, *LENGTHS[2:]), 8), DROP).last_hidden_state
    assert torch.equal(first[:5], second[:5]) and torch.equal(first[75:], second[75:])
    assert not torch.equal(first[5:75], second[5:75])
    torch.testing.assert_close(third[:5], first[:5], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(third[205:], first[75:], atol=1e-5, rtol=1e-5)


def padded_batches(model, lengths):
    """Shapes of the batches that a linear attention layer runs on, and the hidden states of the decoder."""
    calls, layer = [], model.model.language_model.layers[0].linear_attn
    handle = layer.in_proj_z.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].shape))
    with torch.no_grad():
        plan = DROP.plan(text_segments(*lengths), 8)
        hidden = run_layers(model.model.language_model, stream(0, lengths), plan, DROP).last_hidden_state
    handle.remove()
    return calls, hidden


def test_segments_of_similar_lengths_share_a_padded_batch(packed):
    """Rows are a whole number of chunks. Under ZeRO-3 every rank calls a module equally often, whatever its samples."""
    calls, hidden = padded_batches(packed, LENGTHS)
    assert calls == [(3, 3 * DELTA_CHUNK, 32), (2, DELTA_CHUNK, 32)]
    weight = packed.model.language_model.layers[0].linear_attn.in_proj_z.weight
    weight.ds_id = 0
    try:
        calls, together = padded_batches(packed, LENGTHS)
    finally:
        del weight.ds_id
    assert calls == [(len(LENGTHS), 3 * DELTA_CHUNK, 32)]
    torch.testing.assert_close(together, hidden, atol=1e-5, rtol=1e-5)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=40))
def test_padding_is_at_most_a_third(lengths):
    groups = groups_of(lengths)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    for group in groups:
        rows = [max(1, -(-lengths[index] // DELTA_CHUNK)) for index in group]
        assert sum(rows) >= max(rows) * len(rows) * 2 / 3
    batches = padded(lengths, False)
    assert sum(mask.sum() for mask in batches.is_token) == sum(lengths) == len(batches.scatter)
    assert batches.gather[batches.scatter].tolist() == list(range(sum(lengths)))


def test_indices_are_computed_once_per_stage_and_not_kept(packed, monkeypatch):
    """For all linear layers, in the first pass and in later turns."""
    counts, kept = [], []

    def count(name):
        function = getattr(linear_attention, name)

        def counted(*args):
            counts.append(name)
            made = function(*args)
            kept.append(weakref.ref(made.gather if name == "padded" else made[1]))
            return made

        monkeypatch.setattr(linear_attention, name, counted)

    count("padded"), count("by_length")
    text = packed.model.language_model
    with torch.no_grad():
        _, _, cache = prefill(text, DROP, stream(0, (70, 5)), text_segments(70, 5), None)
        assert counts == ["padded"] * 2, "two stages of three linear layers; the last stage has none"
        prefill(text, DROP, stream(1, (3, 4)), text_segments(3, 4), cache)
    assert counts[2:] == ["by_length"] * 2
    gc.collect()
    assert all(array() is None for array in kept)


def states(layer):
    return layer.recurrent_states, layer.conv_states


def test_states_of_groups_are_those_of_single_rows(packed):
    lengths = (5, 300, 1, 130, 290)
    with torch.no_grad():
        parts = stream(0, lengths).split(lengths)
        text = packed.model.language_model
        _, _, cache = prefill(text, DROP, torch.cat(parts), text_segments(*lengths), None)
        for row, (part, length) in enumerate(zip(parts, lengths, strict=True)):
            _, _, alone = prefill(text, DROP, part, text_segments(length), None)
            for layer, single in zip(cache.layers, alone.layers, strict=True):
                if isinstance(layer, StateLayer):
                    torch.testing.assert_close(
                        layer.recurrent_states[0][row], single.recurrent_states[0][0], atol=1e-4, rtol=1e-3
                    )
                    torch.testing.assert_close(
                        layer.conv_states[0][row], single.conv_states[0][0], atol=1e-4, rtol=1e-3
                    )


def ranked(model, layer, hidden_TC, rotary, rows):
    """[V] mean attention of the last row to ``rows`` in a layer that attends, by transformers' formulas."""
    decoder = model.model.language_model.layers[layer]
    attention, normed = decoder.self_attn, decoder.input_layernorm(hidden_TC.unsqueeze(0))
    queries = attention.q_proj(normed).view(1, -1, 4, 2 * attention.head_dim).chunk(2, dim=-1)[0]
    queries = attention.q_norm(queries).transpose(1, 2)
    keys = attention.k_norm(attention.k_proj(normed).view(1, -1, 2, attention.head_dim)).transpose(1, 2)
    queries, keys = apply_rotary_pos_emb(queries, keys, *rotary)
    scores = queries[0, :, -1:] @ keys[0].repeat_interleave(2, dim=0).mT * attention.scaling
    return scores.softmax(dim=-1).mean(dim=(0, 1))[rows]


def reference(model, inputs, method=DROP):
    """[L'] hidden states, and the kept image tokens: one sample at a time, through plain layers, with gathers."""
    base, text = model.model, model.model.language_model
    ids = inputs["input_ids"]
    hidden = text.embed_tokens(ids)[0]
    visual = ids[0] == 8
    features = base.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    hidden = hidden.masked_scatter(visual[:, None], torch.cat(list(features)))
    more = {key: inputs[key] for key in ("mm_token_type_ids", "image_grid_thw", "attention_mask")}
    positions = base.get_rope_index(ids, **more)[0][:, 0]
    image = torch.full_like(ids[0], -1)
    image[visual] = torch.repeat_interleave(torch.arange(len(features)), torch.tensor([len(f) for f in features]))
    number = torch.cat([torch.arange(len(part)) for part in features])
    place = torch.full_like(ids[0], -1)
    place[visual] = number
    kept, first = [], 0
    for layer, keep in zip((*method.layers, 8), (*method.keep, None), strict=True):
        hidden = plain_decoder(model, hidden, positions, slice(first, layer))
        first = layer
        if keep is None:
            break
        rotary = text.rotary_emb(hidden[None], positions.unsqueeze(1))
        chosen = image < 0
        for index, part in enumerate(features):
            rows = (image == index).nonzero()[:, 0]
            best = ranked(model, layer, hidden, rotary, rows).topk(int(len(part) * keep)).indices
            chosen[rows[best]] = True
        hidden, positions, image, place = hidden[chosen], positions[:, chosen], image[chosen], place[chosen]
        kept.append([place[image == index] for index in range(len(features))])
    return hidden, kept


@pytest.mark.parametrize("row", [0, 1, 3])
def test_dropping_is_the_slow_loop(plain, packed, row):
    inputs = family_inputs("qwen3_5", [BATCH[row]])
    with torch.no_grad():
        hidden, kept = reference(plain, inputs)
        logits = plain.lm_head(plain.model.language_model.norm(hidden[-1:]))
        ours = packed(**inputs, use_cache=False).logits[0, -1:]
    found = kept_tokens(packed, inputs)[0]
    for drop, images in enumerate(kept):
        for image, tokens in enumerate(images):
            assert found[image][drop].tolist() == tokens.tolist()
    torch.testing.assert_close(ours, logits, atol=1e-3, rtol=1e-4)


def test_later_turns_continue_the_states(packed):
    """Rows of different lengths, several new tokens, one new token, then single steps: as the whole row at once."""
    text = packed.model.language_model
    turns = [(70, 5, 3), (4, 1, 1), (9, 9, 4)]
    rows = [stream(row, (200,)) for row in range(3)]
    with torch.no_grad():
        cache, at = None, [0, 0, 0]
        for turn in turns:
            embeds = torch.cat([row[a : a + n] for row, a, n in zip(rows, at, turn, strict=True)])
            hidden, _, cache = prefill(text, DROP, embeds, text_segments(*turn), cache)
            at = [a + n for a, n in zip(at, turn, strict=True)]
        last = hidden[np.cumsum(turns[-1]) - 1]
        step = decode(text, DROP, torch.stack([row[a] for row, a in zip(rows, at, strict=True)])[:, None], cache)
        for index, (row, end) in enumerate(zip(rows, at, strict=True)):
            plan = DROP.plan(text_segments(end + 1), 8)
            expected = text.norm(run_layers(text, row[: end + 1], plan, DROP).last_hidden_state)
            torch.testing.assert_close(last[index], expected[-2], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(step[index, 0], expected[-1], atol=1e-4, rtol=1e-4)


def test_turns_with_images_in_a_batch_equal_single_ones(packed):
    """The second turn of every row brings other lengths and, in some, an image."""
    first = [[0, "what is shown here ?"], ["what is a dog ?"], [3, 0, "left ?"]]
    second = [["a red cat"], [1, "two ?"], ["yes . on the", 2, "round ?"]]

    def logits(rows):
        cache, out = DynamicCache(), None
        one, two = ([texts[row] for row in rows] for texts in (first, second))
        with torch.no_grad():
            inputs = family_inputs("qwen3_5", one)
            packed(**inputs, past_key_values=cache, use_cache=True)
            more = family_inputs("qwen3_5", two)
            more["attention_mask"] = torch.cat([inputs["attention_mask"], more["attention_mask"]], dim=1)
            out = packed(**more, past_key_values=cache, use_cache=True).logits[:, -1]
        return out, cache

    together, cache = logits([0, 1, 2])
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], logits([row])[0], atol=2e-4, rtol=1e-4)
    kinds = [type(layer) for layer in cache.layers]
    assert kinds == [StagedLayer if index in PATTERN else StateLayer for index in range(8)]
    states = 3 * (4 * 8 * 12 + (2 * 2 * 8 + 4 * 12) * 4) * 4
    keys = sum(2 * layer.keys.numel() * 4 for layer in cache.layers if isinstance(layer, StagedLayer))
    assert cache_bytes(cache) == 6 * states + keys


def test_rows_of_the_cache_are_selected_and_reset(packed):
    def filled():
        cache = staged(None, 8, DROP, PATTERN)
        with torch.no_grad():
            prefill(packed.model.language_model, DROP, stream(0, (70, 5)), text_segments(70, 5), cache)
        return cache

    before, rows = filled(), torch.tensor([1, 1, 0])
    for change, expected in (
        (lambda cache: cache.reorder_cache(rows), rows),
        (lambda cache: cache.batch_select_indices(rows), rows),
        (lambda cache: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1])),
    ):
        cache = filled()
        change(cache)
        for layer, old in zip(cache.layers, before.layers, strict=True):
            if isinstance(layer, StateLayer):
                assert torch.equal(layer.recurrent_states[0], old.recurrent_states[0][expected])
                assert torch.equal(layer.conv_states[0], old.conv_states[0][expected])
    assert before.get_seq_length() == 70
    with pytest.raises(ValueError, match="cannot forget tokens"):
        before.crop(-1)
    before.reset()
    assert before.get_seq_length() == 0 and cache_bytes(before) == 0


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
def test_beams(packed, options):
    """A row in a batch has the beams that it has alone."""

    def answers(rows):
        inputs = family_inputs("qwen3_5", rows)
        with torch.no_grad():
            made = packed.generate(**inputs, max_new_tokens=5, do_sample=False, **options)
        return made[:, inputs["input_ids"].shape[1] :]

    together, count = answers(BATCH), options.get("num_return_sequences", 1)
    for index, row in enumerate(BATCH):
        assert torch.equal(together[index * count : (index + 1) * count], answers([row]))


def test_dropping_between_linear_layers():
    """Methods that do not rank by attention may drop anywhere; a batch equals single rows, also in later steps."""
    model = make(Combined(methods=(Random(layer=1, keep=0.5), Random(layer=5, keep=0.5))))
    for side in ("left", "right"):
        inputs = family_inputs("qwen3_5", BATCH, side)
        with torch.no_grad():
            together = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, -5:]
            for row, expected in zip(BATCH, together, strict=True):
                alone = family_inputs("qwen3_5", [row])
                assert torch.equal(model.generate(**alone, max_new_tokens=5, do_sample=False)[0, -5:], expected)


def test_a_layer_without_queries_cannot_rank():
    with pytest.raises(ValueError, match=re.escape("layer 2 (rank_with=next_layer), which has linear attention")):
        make(PyramidDrop(layers=(2, 7), keep=(0.5, 0.25)))
    with pytest.raises(ValueError, match="drop before 4, the nearest is 4"):
        make(FastV(layer=2))
    with pytest.raises(ValueError, match="plphp removes keys in decoder layer"):
        make(PLPHP())


def test_default_drop_points_move_to_layers_that_attend():
    config = qwen3_5(PATTERN).config.text_config
    assert [drop.layer for drop in fitted(PyramidDrop(keep=(0.5, 0.25)), config).drops(8)] == [3, 7]
    assert [drop.layer for drop in fitted(FastV(), config).drops(8)] == [4]
    explicit = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25))
    assert fitted(explicit, config) is explicit
    model = make("fastv")
    assert model.config.pruning["layer"] == 4
    check_attending(Random(layer=1), config)
    section = PruningConfig(keep=[0.5, 0.25])
    section.fit(config)
    assert section.settings["layers"] == [3, 7] and section.build().drops(8)[0].layer == 3


def decoder(depth):
    """A text config in which every fourth layer attends."""
    kinds = ["full_attention" if layer % 4 == 3 else "linear_attention" for layer in range(depth)]
    return SimpleNamespace(num_hidden_layers=depth, layer_types=kinds)


@pytest.mark.parametrize("method", [FastV(), SparseVLM(), Feather()], ids=lambda method: method.name)
def test_a_decoder_in_which_no_layer_can_rank(method):
    """Only the last of 4 layers attends, after which nothing can be dropped."""
    assert fitted(method, decoder(4)) is method
    with pytest.raises(ValueError, match=rf"{method.name} cannot rank in this decoder of 4 layers .* attend: 3\)"):
        check_attending(method, decoder(4))


def test_more_drop_points_than_layers_that_attend():
    with pytest.raises(
        ValueError, match=r"pyramiddrop has 3 drop points .* only 2 are possible \(before 3, 7; .* at most 2"
    ):
        check_attending(fitted(PyramidDrop(), decoder(8)), decoder(8))


@pytest.mark.parametrize(
    ("method", "layers"),
    [(PyramidDrop(), (7, 15, 23)), (SparseVLM(), (3, 7, 15)), (HiDrop(), (11, 15, 19, 23))],
    ids=repr,
)
def test_default_drop_points_follow_the_setting(method, layers):
    assert fitted(method, decoder(32)).layers == layers
    check_attending(fitted(method, decoder(32)), decoder(32))


def test_moved_drop_points_that_a_method_refuses():
    with pytest.raises(ValueError, match=r"moving them to layers=.* does not fit: layers=.* must lie between enter=6"):
        fitted(HiDrop(), decoder(24))


def test_moved_drop_points_are_logged(caplog):
    with caplog.at_level("INFO"):
        make("fastv")
    assert "drop points moved to layers that attend" in caplog.text and "before layer 4" in caplog.text


def test_the_loss_of_the_router_is_not_computed():
    model = prune(family_model("qwen3_5_moe"), None)
    with pytest.raises(ValueError, match="does not take output_router_logits"):
        model(**family_inputs("qwen3_5_moe", BATCH), output_router_logits=True)


def test_only_layers_with_attention_keep_keys():
    visual = VisualTokens.of([80, 40, 20], [3, 4, 1], [1.0] * 8, attending=(3, 7))
    assert visual == VisualTokens(
        entering=(3 * 80 + 4 * 40 + 20) / 8, leaving=(2 * 80 + 4 * 40 + 2 * 20) / 8, cached=30
    )


def test_flops_of_linear_layers():
    """By hand: 6 layers with linear attention, 2 that attend, of 10 and 4 tokens."""
    decoder = DecoderGeometry.of(qwen3_5(PATTERN).config.text_config)
    channels = 2 * 2 * 8 + 4 * 12
    projections = 2 * 32 * (channels + 48 + 4 + 4 + 48 + 3 * 48)
    mixing = 2 * 4 * channels + 4 * (6 * 8 * 12 + 64 * (4 * 8 + 2 * 12))
    attends = 2 * 32 * (3 * 64 + 2 * 32 + 3 * 48)
    pairs = 2 * 4 * 16
    expected = [
        3 * 10 * (projections + mixing) + 10 * attends + pairs * 110,
        3 * 4 * (projections + mixing) + 4 * attends + pairs * 20,
    ]
    assert decoder.stages(np.array([10, 4]), [4, 4]).tolist() == expected
    assert decoder.state_values == 6 * (4 * 8 * 12 + channels * 4)


def test_flops_of_a_linear_layer_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    layer, decoder = make().model.language_model.layers[0], None
    decoder = DecoderGeometry.of(qwen3_5(PATTERN).config.text_config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(1, 2 * DELTA_CHUNK, 32), position_embeddings=None)
    counted = decoder.linear_per_token + decoder.linear.mixing
    # torch counts the convolution of the padding in front, too.
    extra = 2 * decoder.linear.kernel * decoder.linear.channels * (decoder.linear.kernel - 1)
    assert counter.get_total_flops() == 2 * DELTA_CHUNK * counted + extra


def test_kernels_get_rows_without_bounds(packed, monkeypatch):
    """The padded batch needs no bounds of a kernel: none is passed, and what is in a row belongs to one sample."""
    seen = []
    original = modeling_qwen3_5.torch_chunk_gated_delta_rule

    def kernel(query, key, value, **keywords):
        seen.append((tuple(query.shape[:2]), keywords.get("cu_seqlens")))
        return original(query, key, value, **keywords)

    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", kernel)
    with torch.no_grad():
        run_layers(packed.model.language_model, stream(0, (5, 70)), DROP.plan(text_segments(5, 70), 8), DROP)
    assert seen == [((2, 2 * DELTA_CHUNK), None)] * 6


def test_two_turns_like_one_prompt_without_dropping():
    """generate on the cache of an earlier turn, without dropping: as plain transformers on the whole conversation."""
    plain, model = family_model("qwen3_5"), prune(family_model("qwen3_5"), None)
    inputs = family_inputs("qwen3_5", [[0, "what is shown here ?", "a red cat", "left ? yes"]])
    whole = plain.generate(**inputs, max_new_tokens=5, do_sample=False)
    cache, first = DynamicCache(), inputs["input_ids"].shape[1] - 5
    start = {
        key: value if key in ("pixel_values", "image_grid_thw") else value[:, :first] for key, value in inputs.items()
    }
    with torch.no_grad():
        model(**start, past_key_values=cache, use_cache=True)
        again = {key: inputs[key] for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
        made = model.generate(**again, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert torch.equal(made, whole)
