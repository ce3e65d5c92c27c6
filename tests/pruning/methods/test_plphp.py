"""PLPHP against a slow reference: classes of layers, each head's own tokens, in training and after a prefill."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.key_choice import packed_decoder, random_prompt
from tests.support.key_passes import check_decoding, check_pass
from tests.support.key_reference import plphp
from tests.support.packed import random_segment
from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.models.forward.padded import prefill
from vtprune_train.pruning import method_from_settings
from vtprune_train.pruning.methods.plphp import PLPHP
from vtprune_train.pruning.ops.per_head import keep_best


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0]), max_size=6), min_size=1, max_size=5),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_the_best_of_every_head_and_span(values, heads, random):
    """Ties go to the earlier token; spans may be empty."""
    spans = [index for index, own in enumerate(values) for _ in own]
    counts = [random.randint(0, len(own)) for own in values]
    flat = [value for own in values for value in own]
    rows = [random.sample(flat, len(flat)) if head else flat for head in range(heads)]
    kept = keep_best(
        torch.tensor(rows).reshape(heads, len(flat)), torch.tensor(spans, dtype=torch.int64), torch.tensor(counts)
    )
    for head, row in enumerate(rows):
        for span, count in enumerate(counts):
            own = [i for i, s in enumerate(spans) if s == span]
            best = sorted(own, key=lambda i: (-row[i], i))[:count]
            assert [i for i in own if kept[head, i]] == sorted(best)


THRESHOLDS = st.sampled_from([(0.25, 0.1), (0.6, 0.4), (0.9, 0.5), (0.3, 0.3)])


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=3),
    st.sampled_from([(0.4, 0.3), (0.5, 0.5), (1.0, 0.0), (0.2, 0.1)]),
    THRESHOLDS,
    st.sampled_from([1, 2, 4]),
    st.booleans(),
)
def test_a_pass_equals_the_slow_reference(seed, shapes, rates, thresholds, kv_heads, plain):
    """Any number of images and turns, grouped queries, a batch. An image judged late is compared with all before it,
    seen or not, which is what the reference does too."""
    rng = np.random.default_rng(seed)
    text_model = packed_decoder(seed, kv_heads=kv_heads)
    setting = {"keep": rates[0], "delta": rates[1], "alpha": thresholds[0], "beta": thresholds[1]}
    method = PLPHP(**setting, untouched=seed % 3)
    segments = [random_segment(rng, images, turns, plain) for images, turns in shapes]
    check_pass(text_model, method, segments, lambda *of: plphp(*of, kv_heads, **setting), rng)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 3), min_size=1, max_size=4), THRESHOLDS, st.sampled_from([1, 2]))
def test_decoding_equals_the_slow_reference(seed, images, thresholds, kv_heads):
    """A batch whose rows fall into different classes: every row by itself, with each head's own cache."""
    rng = np.random.default_rng(seed)
    text_model = packed_decoder(seed, kv_heads=kv_heads)
    setting = {"keep": 0.4, "delta": 0.3, "alpha": thresholds[0], "beta": thresholds[1]}
    method = PLPHP(**setting)
    segments = [random_prompt(rng, n) for n in images]
    check_decoding(text_model, method, segments, lambda *of: plphp(*of, kv_heads, **setting), rng)


def test_classes_at_their_thresholds():
    """Attentive from alpha on, indifferent below beta."""
    gamma = torch.tensor([0.5, 0.49, 0.25, 0.24])
    counts = PLPHP(keep=0.4, delta=0.3, alpha=0.5, beta=0.25).counts(gamma, torch.full((4,), 90))
    assert counts.tolist() == [63, 36, 36, 9]


@pytest.mark.parametrize(("alpha", "beta", "kept"), [(0.0, 0.0, 63), (2.0, 0.0, 36), (2.0, 2.0, 9)])
def test_caches_hold_what_the_rates_promise(alpha, beta, kept):
    """Of 90 tokens; 0.7 * 90 is 62.99999999999999 in floating point, (0.4 - 0.3) * 90 is 9.000000000000004."""
    segment = SegmentLayout(96, (ImageSpan(2, 90),), (95,))
    embeds = torch.from_numpy(np.random.default_rng(0).standard_normal((96, 32)))
    with torch.no_grad():
        _, _, cache = prefill(packed_decoder(0), PLPHP(alpha=alpha, beta=beta, untouched=0), embeds, [segment])
    assert [int(layer.num_tokens()[0]) - 6 for layer in cache.layers] == [kept] * 6


def test_classes_differ_by_layer_and_by_row():
    """The cases that the comparisons above are about do occur."""
    found = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        segments = [random_prompt(rng, 1) for _ in range(3)]
        embeds = torch.from_numpy(rng.standard_normal((sum(s.length for s in segments), 32)))
        method = PLPHP(alpha=0.7, beta=0.5)
        with torch.no_grad():
            _, _, cache = prefill(packed_decoder(seed), method, embeds, segments)
        for layer in cache.layers[1:]:
            for segment, tokens in zip(segments, layer.num_tokens().tolist(), strict=True):
                n = segment.spans[0].length
                kept = tokens - (segment.length - n)
                counts = [n * tenths // 10 for tenths in (1, 4, 7)]
                assert kept in counts
                found |= {counts.index(kept)} if len(set(counts)) == 3 else set()
    assert found == {0, 1, 2}


@pytest.mark.parametrize("num_layers", [2, 6, 8, 32, 40])
def test_defaults_fit_any_depth_and_budgets_are_met(num_layers):
    method = PLPHP()
    layers = method.key_layers(num_layers)
    assert layers == tuple(range(max(1, round(num_layers / 16)), num_layers))
    share = method.input_share(num_layers)
    assert share == pytest.approx((layers[0] + len(layers) * 0.4) / num_layers)
    for wanted in (1.0, 0.9, (share + 1) / 2, layers[0] / num_layers + 0.01):
        scaled = method.for_budget(wanted, num_layers)
        assert scaled.input_share(num_layers) == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(ValueError, match="out of range for plphp"):
        method.for_budget(layers[0] / num_layers / 2, num_layers)
    assert method.eased(1.0, 0.0).keep == 1.0
    assert method.eased(1.0, 1.0) == method


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"keep": 1.5}, r"keep=1.5 is not in \[0, 1\]"),
        ({"delta": 0.5}, "delta=0.5: .* use at most 0.4"),
        ({"beta": 0.5}, "beta=0.5 is larger than alpha=0.25"),
        ({"alpha": math.nan}, "alpha=nan should be a finite number"),
        ({"beta": math.nan}, "beta=nan should be a finite number"),
        ({"delta": math.nan}, "delta=nan: keep - delta"),
        ({"untouched": -1}, "untouched=-1 should be greater than or equal to 0"),
        ({"multi_turn": "forget"}, "multi_turn='forget' is not one of"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        PLPHP(**setting)


def test_settings_and_depth():
    with pytest.raises(ValueError, match="untouched=6 leaves no layer to prune in a decoder of 6 layers"):
        PLPHP(untouched=6).key_layers(6)
    method = PLPHP(keep=0.5, delta=0.2, untouched=1)
    assert method_from_settings(method.settings()) == method
