"""Global steps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune_train.data.order import EpochOrder
from vtprune_train.data.plan.planner import Planner, data_digest


def planner(tokens, world_size=1, batch=8, max_tokens=100, seed=0, costs=None):
    tokens = np.array(tokens)
    costs = tokens.astype(float) if costs is None else np.array(costs, dtype=float)
    return Planner(
        EpochOrder([len(tokens)], seed),
        lambda _, samples: (tokens[samples], costs[samples]),
        longest=tokens.max(initial=0),
        global_batch_size=batch,
        max_tokens=max_tokens,
        world_size=world_size,
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 5), st.integers(1, 20))
def test_each_sample_once_an_epoch_within_the_limits(tokens, world_size, batch):
    plans = planner(tokens, world_size, batch)
    seen = []
    for step in range(plans.steps_per_epoch):
        plan = plans.plan(step)
        dealt = [s for micro in plan.micro_batches for rank in micro for s in rank]
        assert sorted(dealt) == sorted(plan.samples)
        assert all(len(micro) == world_size for micro in plan.micro_batches)
        assert all(sum(tokens[s] for s in rank) <= 100 for micro in plan.micro_batches for rank in micro)
        expected = min(batch, len(tokens) - step * batch)
        assert len(plan.samples) == expected
        seen += plan.samples
    assert sorted(seen) == list(range(len(tokens)))


def test_order_depends_on_seed_and_epoch_alone():
    tokens = np.random.default_rng(0).integers(1, 90, 100)
    one, two = planner(tokens, 1), planner(tokens, 4, max_tokens=300)
    steps = one.steps_per_epoch
    assert [one.plan(s).samples for s in range(2 * steps)] == [two.plan(s).samples for s in range(2 * steps)]
    assert one.plan(0).samples != one.plan(steps).samples
    assert one.plan(0).samples != planner(tokens, seed=1).plan(0).samples
    assert one.plan(3) == planner(tokens).plan(3)


def test_ranks_share_the_cost():
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 3000, 1024)
    plans = planner(tokens, world_size=8, batch=128, max_tokens=16384)
    for step in range(8):
        for micro in plans.plan(step).micro_batches:
            costs = [sum(tokens[s] for s in rank) for rank in micro]
            assert max(costs) <= 1.05 * np.mean(costs)


def test_errors_name_the_setting():
    with pytest.raises(ValueError, match=r"data.max_tokens=100 is smaller than the longest sample .120 tokens"):
        planner([5, 120]).plan(0)
    with pytest.raises(ValueError, match="no samples"):
        planner(np.zeros(0, dtype=int))


def test_digest():
    assert data_digest(["a", "b"]) == data_digest(["a", "b"]) != data_digest(["b", "a"])
