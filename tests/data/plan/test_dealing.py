"""Dealing a step: memory is bounded by tokens before dropping, waiting by cost after it."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune_train.data.plan.dealing import deal, fewest_bins

ROOT = Path(__file__).parents[3]
STEPS = st.lists(st.tuples(st.integers(1, 100), st.floats(0, 1e15)), max_size=80)


def load(dealt, values):
    """[micro-steps, ranks] the sum of ``values`` in each micro-batch."""
    return np.array([[values[list(rank)].sum() for rank in ranks] for ranks in dealt])


@settings(max_examples=100, deadline=None)
@given(STEPS, st.integers(1, 9), st.integers(100, 260))
def test_every_sample_once_within_the_limit_and_as_many_micro_batches_for_each_rank(samples, world_size, max_tokens):
    tokens = np.array([t for t, _ in samples], dtype=np.int64)
    costs = np.array([c for _, c in samples], dtype=float)
    dealt = deal(tokens, costs, world_size, max_tokens)
    assert sorted(s for ranks in dealt for rank in ranks for s in rank) == list(range(len(samples)))
    assert all(len(ranks) == world_size for ranks in dealt)
    assert load(dealt, tokens).max() <= max_tokens
    assert dealt == deal(tokens.copy(), costs.copy(), world_size, max_tokens)
    fewest = max(1, -(-fewest_bins(tokens, max_tokens) // world_size))
    # What best fit decreasing is known not to exceed, in micro-batches.
    assert fewest <= len(dealt) <= max(1, -(-int(11 / 9 * fewest * world_size + 1) // world_size))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(30, 60))
def test_no_packing_goes_below_the_bound(tokens, max_tokens):
    def fits(left, bins):
        if not left:
            return True
        return any(
            fits(left[1:], [*bins[:i], room - left[0], *bins[i + 1 :]])
            for i, room in enumerate(bins)
            if room >= left[0] and room not in bins[:i]
        )

    possible = next(n for n in range(1, 9) if fits(sorted(tokens, reverse=True), [max_tokens] * n))
    assert fewest_bins(np.array(tokens), max_tokens) <= possible
    assert len(deal(np.array(tokens), np.ones(len(tokens)), 1, max_tokens)) <= possible + 1


def test_degenerate_steps():
    assert deal(np.zeros(0, dtype=int), np.zeros(0), 3, 10) == (((), (), ()),)
    assert sorted(deal(np.array([5]), np.array([1.0]), 4, 10)[0]) == [(), (), (), (0,)]
    assert deal(np.array([6, 6]), np.array([1.0, 2.0]), 1, 10) == (((1,),), ((0,),))
    assert len(deal(np.ones(7, dtype=int), np.zeros(7), 2, 100)) == 1, "samples that cost nothing"
    with pytest.raises(AssertionError, match="the planner refuses longer samples"):
        deal(np.array([5, 120]), np.ones(2), 2, 100)


def mix(count, seed=0):
    """Mostly long samples of about the same cost, some short ones that cost more for their length."""
    rng = np.random.default_rng(seed)
    visual = rng.choice([0, 1752, 2340, 2928], count, p=[0.05, 0.1, 0.6, 0.25])
    text = np.where(visual == 0, rng.integers(40, 2000, count), rng.integers(40, 300, count))
    return visual + text, visual * 0.47 + text + 0.3 * visual


@pytest.mark.parametrize(("world_size", "max_tokens"), [(2, 16384), (8, 16384), (64, 8192), (512, 16384)])
def test_ranks_wait_for_each_other_little(world_size, max_tokens):
    tokens, costs = mix(16 * world_size)
    done = load(deal(tokens, costs, world_size, max_tokens), costs)
    assert done.max(axis=1).sum() <= 1.03 * done.sum(axis=0).mean(), "if they meet after each micro-step"
    assert done.sum(axis=0).max() <= 1.03 * done.sum(axis=0).mean(), "if they meet once"


def test_no_way_of_dealing_could_do_much_better():
    """Against a bound that holds for any dealing: the mean, or the costliest sample where that alone is more."""
    rng = np.random.default_rng(3)
    for world_size in (2, 5, 16):
        for _ in range(10):
            costs = rng.pareto(2.0, 16 * world_size) + 0.1
            tokens = np.minimum(1000, 100 * costs).astype(int) + 1
            done = load(deal(tokens, costs, world_size, 4000), costs)
            bound = max(done.sum() / world_size, costs.max())
            assert done.max(axis=1).sum() <= 1.25 * bound


def test_thousands_of_ranks_take_a_fraction_of_a_second():
    tokens, costs = mix(16 * 4096)
    times = []
    for _ in range(3):
        began = time.process_time()
        deal(tokens, costs, 4096, 16384)
        times.append(time.process_time() - began)
    assert min(times) < 1.0, times


@pytest.fixture(scope="module")
def simulate():
    spec = importlib.util.spec_from_file_location("simulate_balance", ROOT / "scripts" / "simulate_balance.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look
    spec.loader.exec_module(module)
    return module


def test_the_simulation_runs_and_ours_is_the_most_even(simulate, tmp_path, capsys):
    simulate.main(["--quick", "--ranks", "8", "--json", str(tmp_path / "a.json")])
    table = capsys.readouterr().out
    results = {r["sampler"]: r for r in json.loads((tmp_path / "a.json").read_text())["results"]}
    assert all(f"| 8 | {name} | {r['max_over_mean']:.3f} |" in table for name, r in results.items())
    assert results["ours"]["max_over_mean"] <= 1.03
    assert all(results["ours"]["max_over_mean"] < r["max_over_mean"] for n, r in results.items() if n != "ours")
    assert results["ours"]["most_tokens"] <= 16384
    with pytest.raises(SystemExit):
        simulate.main(["--micro_batch", "5"])
    assert "is not a multiple of --micro_batch 5" in capsys.readouterr().err


def test_the_published_split_has_equal_counts_and_about_equal_lengths(simulate):
    """By hand: the longest first, each to the shortest chunk that is not full; dealt round where counts differ."""
    lengths = np.array([9, 8, 7, 3, 2, 1])
    assert simulate.even_chunks(np.arange(6), lengths, 2) == [0, 3, 4, 1, 2, 5]
    assert simulate.even_chunks(np.arange(5), lengths, 2) == [0, 2, 4, 1, 3]
