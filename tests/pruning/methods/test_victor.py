"""Victor: registers stand behind each image, the image goes after the first layers; against one written with loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.slow_learned import compared, slow_victor
from vtprune_train.core.plan import counts_per_stage
from vtprune_train.core.stream import ImageSpan, SegmentLayout, SpanLayout
from vtprune_train.pruning.learned import is_register, joined
from vtprune_train.pruning.methods.victor import Victor

COUNTS = st.lists(st.integers(1, 9), max_size=5)


@settings(max_examples=25, deadline=None)
@given(COUNTS, st.integers(1, 4))
def test_registers_stand_behind_each_image(lengths, number):
    spans = [SpanLayout(0, i, length, length, length + number) for i, length in enumerate(lengths)]
    chosen, at = joined(spans, number, sum(lengths), torch.device("cpu"))
    expected, new, token = [], [], 0
    for length in lengths:
        expected += range(token, token + length)
        token += length
        new += range(len(expected), len(expected) + number)
        expected += [token - 1] * number
    assert chosen.tolist() == expected
    assert at.tolist() == new
    span_of = [i for i, length in enumerate(lengths) for _ in range(length + number)]
    assert torch.nonzero(is_register(torch.tensor(span_of, dtype=torch.int64), number)).flatten().tolist() == new


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 9999),
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([1, 2, 4]),
)
def test_equals_the_loops(seed, images, registers, layers, kv_heads):
    def slow(text_model, module, embeds, segment):
        return slow_victor(text_model, embeds, segment.spans, module.weight, layers)

    gradients = compared(Victor(registers=registers, layers=layers), images, seed, kv_heads, slow)
    assert (gradients[1].abs().sum() > 0) == (sum(images) > 0)


@pytest.mark.parametrize("num_layers", [2, 6, 8, 32, 40])
def test_the_published_layers_are_scaled(num_layers):
    drops = Victor().drops(num_layers)
    assert [drop.layer for drop in drops] == [0, {2: 1, 6: 1, 8: 1, 32: 3, 40: 4}[num_layers]]
    assert [counts.tolist() for counts in counts_per_stage(drops, [576, 0, 1])] == [[576, 0, 1], [584, 0, 9], [8, 0, 8]]


def test_budgets_are_whole_layers():
    method = Victor().for_budget(0.25, 32)
    assert method.layers == 8
    assert method.input_share(32) == pytest.approx(0.25, abs=1e-3)
    with pytest.raises(ValueError, match=r"out of range for victor, which reaches 0.167 to 0.833"):
        Victor().for_budget(0.1, 6)
    assert Victor().for_budget(0.25, 6).layers == 1, "no more than the budget"


def test_a_shorter_image_than_registers():
    """Everything is counted by registers alone once the image is gone."""
    plan = Victor(registers=8, layers=1).plan([SegmentLayout(5, (ImageSpan(1, 2),), (3,))], 4)
    assert [stage.num_tokens for stage in plan.stages] == [5, 13, 11]


@pytest.mark.parametrize(
    ("settings_", "said"),
    [({"registers": 0}, "registers=0"), ({"layers": 0}, "layers=0"), ({"registers": 1.5}, "registers=1.5")],
)
def test_wrong_settings(settings_, said):
    with pytest.raises(ValueError, match=said):
        Victor(**settings_)


def test_no_layer_left():
    with pytest.raises(ValueError, match=r"layers=6: .* all 6 decoder layers; use at most 5"):
        Victor(layers=6).drops(6)
