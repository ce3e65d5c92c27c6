"""ZipVL against a slow reference: the fewest tokens that hold the mass, in training and after a prefill."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.key_choice import packed_decoder, random_prompt
from tests.support.key_passes import check_decoding, check_pass
from tests.support.key_reference import zipvl
from tests.support.packed import random_segment
from vtprune_train.pruning import method_from_settings
from vtprune_train.pruning.methods.zipvl import ZipVL, mass_holders


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 30), st.sampled_from([0.1, 0.5, 0.975, 1.0]))
def test_the_fewest_that_hold_the_mass(seed, rows, length, tau):
    weights = torch.from_numpy(np.random.default_rng(seed).dirichlet([0.3] * length, rows)).float()
    kept = mass_holders(weights, tau)
    for row, held in zip(weights, kept, strict=True):
        assert row[held].sum() >= tau - 1e-5
        if tau < 1.0:
            assert row[held].sum() - row[held].min() < tau + 1e-5, "one fewer would do"
            assert held.all() or row[held].min() >= row[~held].max()
        else:
            assert held.all()


def test_a_mass_that_tokens_hold_exactly_needs_no_more():
    weights = torch.tensor([[0.25, 0.5, 0.25]])
    assert mass_holders(weights, 0.5).tolist() == [[False, True, False]]
    assert mass_holders(weights, 0.75).tolist() == [[True, True, False]]


SETTINGS = st.sampled_from([{"tau": 0.975, "keep": 1.0}, {"tau": 0.8, "keep": 0.5}, {"tau": 0.4, "keep": 1.0}])


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=3),
    SETTINGS,
    st.sampled_from([1, 2, 4]),
    st.booleans(),
)
def test_a_pass_equals_the_slow_reference(seed, shapes, setting, kv_heads, plain):
    rng = np.random.default_rng(seed)
    text_model = packed_decoder(seed, kv_heads=kv_heads)
    method = ZipVL(**setting)
    segments = [random_segment(rng, images, turns, plain) for images, turns in shapes]
    check_pass(text_model, method, segments, lambda *of: zipvl(*of, kv_heads, **setting), rng)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 3), min_size=1, max_size=4), SETTINGS)
def test_decoding_equals_the_slow_reference(seed, images, setting):
    """Every row and layer keeps another number; no layer is wider than its longest row needs."""
    rng = np.random.default_rng(seed)
    text_model = packed_decoder(seed)
    method = ZipVL(**setting)
    segments = [random_prompt(rng, n) for n in images]
    widths = check_decoding(text_model, method, segments, lambda *of: zipvl(*of, 2, **setting), rng)
    assert all(width == most for width, most in widths)


@pytest.mark.parametrize("num_layers", [2, 6, 8, 32, 40])
def test_budgets_follow_the_published_shares(num_layers):
    method = ZipVL()
    assert method.input_share(num_layers) == pytest.approx(0.497)
    assert ZipVL(tau=0.96).input_share(num_layers) == pytest.approx(0.404)
    assert ZipVL(tau=1.0).input_share(num_layers) == 1.0
    for wanted in (1.0, 0.5, 0.25, 0.1):
        scaled = method.for_budget(wanted, num_layers)
        assert scaled.input_share(num_layers) == pytest.approx(wanted, abs=1e-6)
        assert scaled.keep == wanted
    assert method.for_budget(0.25, num_layers).tau == 0.975, "the limit is what makes it keep less"
    assert method.for_budget(0.8, num_layers).tau > 0.98


def test_settings():
    with pytest.raises(ValueError, match=r"tau=0\.0 is not in"):
        ZipVL(tau=0.0)
    with pytest.raises(ValueError, match=r"keep=2\.0 is not in"):
        ZipVL(keep=2.0)
    with pytest.raises(ValueError, match="multi_turn='forget' is not one of"):
        ZipVL(multi_turn="forget")
    method = ZipVL(tau=0.9, keep=0.5)
    assert method_from_settings(method.settings()) == method


def test_a_warm_up_starts_with_all_keys():
    method = ZipVL(tau=0.9)
    assert method.eased(1.0, 0.0).input_share(6) == 1.0
    assert method.eased(1.0, 1.0).tau == pytest.approx(0.9) and method.eased(0.5, 1.0).keep == 1.0
    assert method.eased(0.5, 0.0).keep == 0.5 and method.eased(0.5, 0.0).tau == 1.0
    assert 0.9 < method.eased(1.0, 0.5).tau < 1.0
