"""The order of an epoch, position by position."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtprune_train.data.order import EpochOrder, permuted


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 127, 1000, 1024, 4097, 65537])
def test_it_is_a_permutation_of_any_size(size):
    for key in ([0, 0], [0, 1], [7, 3]):
        assert np.array_equal(np.sort(permuted(np.arange(size), size, key)), np.arange(size))


def test_parts_are_what_the_whole_is():
    whole = permuted(np.arange(1000), 1000, [5])
    assert np.array_equal(permuted(np.array([999, 3, 3, 500]), 1000, [5]), whole[[999, 3, 3, 500]])
    assert len(permuted(np.zeros(0, dtype=int), 1000, [5])) == 0


def test_every_place_is_as_likely():
    """Chi-square of 30 x 30 cells over 1,500 keys: 841 degrees of freedom, so 1,050 is 5 standard deviations off."""
    counts = np.zeros((30, 30))
    for key in range(1500):
        counts[np.arange(30), permuted(np.arange(30), 30, [key])] += 1
    assert ((counts - 50) ** 2 / 50).sum() < 1050
    orders = {tuple(permuted(np.arange(4), 4, [key])) for key in range(1000)}
    assert len(orders) == 24, "each order of four occurs"


def test_neighbours_are_scattered():
    result = permuted(np.arange(100_000), 100_000, [1]).astype(float)
    assert abs(np.corrcoef(result[:-1], result[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(result, permuted(np.arange(100_000), 100_000, [2]))[0, 1]) < 0.02
    assert abs(np.mean(np.abs(np.diff(result))) / 100_000 - 1 / 3) < 0.01


@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 3.0])), min_size=1, max_size=4)
)
def test_each_source_gives_its_share(sources):
    sizes, weights = zip(*sources, strict=True)
    order = EpochOrder(sizes, 3, weights)
    starts = np.cumsum([0, *sizes])
    drawn = np.zeros(sum(sizes), dtype=int)
    for epoch in range(4):
        samples = order.samples(epoch, 0, len(order))
        drawn += np.bincount(samples, minlength=len(drawn))
        for number, (size, weight) in enumerate(sources):
            own = samples[(samples >= starts[number]) & (samples < starts[number + 1])]
            assert len(own) == order.counts[number] == max(1, round(size * weight))
        for number in range(len(sizes)):  # pass after pass: no sample is two turns ahead of another one
            own = drawn[starts[number] : starts[number + 1]]
            assert own.max() - own.min() <= 1


def test_half_a_source_is_the_other_half_in_the_next_epoch():
    order = EpochOrder([10], 0, [0.5])
    first, second, third = (set(order.samples(epoch, 0, 10).tolist()) for epoch in range(3))
    assert len(first) == 5 and first | second == set(range(10)) and third not in (first, second)
    twice = EpochOrder([10], 0, [2.0]).samples(0, 0, 20).tolist()
    assert sorted(twice) == sorted([*range(10), *range(10)])


def test_seeds_and_epochs_differ_and_seeking_is_slicing():
    order = EpochOrder([50, 7], 1)
    whole = order.samples(2, 0, 57)
    assert np.array_equal(np.concatenate([order.samples(2, i, i + 10) for i in range(0, 57, 10)]), whole)
    others = [order.samples(3, 0, 57), EpochOrder([50, 7], 2).samples(2, 0, 57)]
    assert all(not np.array_equal(whole, other) for other in others)
    assert sorted(whole) == list(range(57))


def test_seeking_takes_no_longer_in_a_large_epoch():
    order = EpochOrder([10**12], 0)
    begun = time.process_time()  # of this process alone, whatever else the machine does
    samples = order.samples(1000, 10**12 - 256, 10**12 + 256)
    assert len(samples) == 256 and samples.max() < 10**12
    assert time.process_time() - begun < 1
