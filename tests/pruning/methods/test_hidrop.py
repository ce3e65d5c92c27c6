"""HiDrop against a slow reading of the paper and its code; what its gradient reaches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.passes import (
    DECODERS,
    SHAPES,
    best_of_each,
    check_against,
    check_singly,
    image_of,
    random_batch_of,
    ranking_rows,
    text_model_of,
)
from tests.support.reference import attention_rows, queries_and_keys, run_layer
from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.models.forward.decoder import run_layers
from vtprune_train.pruning.candidates import Candidates, Ranking
from vtprune_train.pruning.methods.hidrop import HiDrop, gates
from vtprune_train.pruning.ops.scoring import mean_query_attention


def slow_hidrop(enter, layers, keep, leave):
    def run(text_model, segment, embeds):
        theta = text_model.config.rope_parameters["rope_theta"]
        positions, stages = torch.arange(len(embeds)), []
        text = [offset for offset in range(len(embeds)) if image_of(segment, offset) is None]
        alive, x = (text, embeds[text]) if enter else (list(range(len(embeds))), embeds)
        if enter:
            stages.append(alive)
        for index, layer in enumerate(text_model.layers):
            if index == enter and enter:
                now = dict(zip(alive, x, strict=True))
                alive = list(range(len(embeds)))
                x = torch.stack([now.get(offset, embeds[offset]) for offset in alive])
                stages.append(alive)
            if index in layers or index == leave:
                if index == leave:
                    stay = text
                else:
                    ratio = keep[layers.index(index)]
                    weights = attention_rows(*queries_and_keys(layer, x, positions[alive], theta)).mean(dim=0)
                    worth = weights[ranking_rows(segment, alive)].mean(dim=0).tolist()
                    counts = [max(1, int(span.length * ratio)) for span in segment.spans]
                    worth = dict(zip(alive, worth, strict=True))
                    stay = best_of_each(segment, alive, worth, lambda image, _, counts=counts: counts[image])
                x = x[[alive.index(offset) for offset in stay]]
                alive = stay
                stages.append(alive)
            x = run_layer(layer, x, positions[alive], theta)
        return x, stages

    return run


@settings(max_examples=6, deadline=None)
@given(
    st.integers(0, 10_000),
    SHAPES,
    DECODERS,
    st.sampled_from([(1, (2, 3), 5), (2, (3,), 4), (0, (1, 4), 5), (3, (4, 5), 6), (1, (), 2)]),
)
def test_against_the_paper(seed, shapes, decoder, where):
    enter, layers, leave = where
    keep = (0.5, 0.02)[: len(layers)]
    segments, embeds = random_batch_of(seed, shapes)
    method = HiDrop(enter=enter, layers=layers, keep=keep, leave=leave)
    slow = slow_hidrop(enter, list(layers), keep, leave)
    check_against(slow, text_model_of(seed, decoder), method, segments, embeds)


def test_a_batch_is_its_samples():
    segments, embeds = random_batch_of(7, [(2, 2), (0, 1), (1, 1)])
    check_singly(text_model_of(), HiDrop(enter=1, layers=(2, 4), keep=(0.5, 0.2), leave=5), segments, embeds)


def trained(method, segments, embeds, training=True):
    """Hidden states and the gradients of a pass in training."""
    text_model = text_model_of().train(training)
    leaf = embeds.clone().requires_grad_()
    hidden = run_layers(text_model, leaf, method.plan(segments, 6), method).last_hidden_state
    hidden.square().sum().backward()
    return hidden.detach(), leaf.grad, text_model


def test_the_gate_changes_no_value_and_its_gradient_reaches_what_ranks():
    segments, embeds = random_batch_of(11, [(2, 1), (1, 2)])
    where = {"enter": 1, "layers": (2, 3), "keep": (0.5, 0.2), "leave": 5}
    soft, soft_grad, soft_model = trained(HiDrop(**where), segments, embeds)
    hard, hard_grad, hard_model = trained(HiDrop(**where, differentiable=False), segments, embeds)
    assert torch.equal(soft, hard)
    assert not torch.equal(soft_grad, hard_grad)
    soft_grad, hard_grad = (
        trained(HiDrop(**where, differentiable=soft), segments, embeds, training=False)[1] for soft in (True, False)
    )
    assert torch.equal(soft_grad, hard_grad), "outside training nothing is gated"
    for index in range(6):  # layers 2 and 3 rank; what comes before is reached through them, what comes behind is not
        ours, theirs = (model.layers[index].self_attn.q_proj.weight.grad for model in (soft_model, hard_model))
        assert torch.equal(ours, theirs) == (index > 3), index
    with torch.no_grad():
        plan = HiDrop(**where).plan(segments, 6)
        assert torch.equal(run_layers(text_model_of(), embeds, plan, HiDrop(**where)).last_hidden_state, hard)


def test_a_surer_token_is_a_larger_one():
    """The gradient is that of the kept tokens times their gates, and the tokens' own is as if there were none."""
    segments, embeds = random_batch_of(13, [(2, 1), (1, 2)])
    method = HiDrop(enter=0, layers=(1,), keep=(0.4,), leave=6)
    (boundary,) = method.plan(segments, 6).boundaries
    hidden = embeds[boundary.visual_rows].requires_grad_()
    queries = torch.randn(len(boundary.query_rows), 2, 4, dtype=torch.float64, requires_grad=True)
    ranking = Ranking(queries, torch.randn(len(embeds), 2, 4, dtype=torch.float64), 0.5)
    found = method.choose(Candidates(boundary, hidden, hidden, hidden[:0], ranking, training=True))
    upstream = torch.randn(found.values.shape, dtype=torch.float64)
    to_queries, to_hidden = torch.autograd.grad(found.values, (queries, hidden), upstream)
    scores = mean_query_attention(ranking, boundary)
    kept = hidden.detach()[found.chosen]
    gated = kept * gates(scores, boundary, method.temperature)[found.chosen, None]
    torch.testing.assert_close(to_queries, torch.autograd.grad(gated, queries, upstream)[0])
    assert torch.equal(to_hidden[found.chosen], upstream)


def test_what_keeps_everything_gets_no_gate():
    segments, embeds = random_batch_of(12, [(2, 1), (1, 2)])
    where = {"enter": 0, "layers": (2,), "keep": (1.0,), "leave": 6}
    soft, soft_grad, _ = trained(HiDrop(**where), segments, embeds)
    hard, hard_grad, _ = trained(HiDrop(**where, differentiable=False), segments, embeds)
    assert torch.equal(soft, hard)
    assert torch.equal(soft_grad, hard_grad)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=4),
    st.integers(0, 1000),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.sampled_from([1.0, 1e-4]),
)
def test_gates(lengths, seed, temperature, apart):
    """Above a half for those that stay, below for the others; the gradient is the sigmoid's, and no larger where
    scores are nearly equal."""
    spans, start = [], 1
    for length in lengths:
        spans.append(ImageSpan(start, length))
        start += length + 1
    segment = SegmentLayout(start + 2, tuple(spans), (start,))
    method = HiDrop(enter=0, layers=(1,), keep=(0.4,), leave=6)
    (boundary,) = method.plan([segment], 6).boundaries
    generator = torch.Generator().manual_seed(seed)
    scores = 1 - apart * torch.rand(sum(lengths), generator=generator, dtype=torch.float64)
    scores.requires_grad_()
    found = gates(scores, boundary, temperature)
    (grad,) = torch.autograd.grad(found.sum(), scores) if found.requires_grad else (torch.zeros_like(scores),)
    first = 0
    for span in boundary.spans:
        own = slice(first, first + span.before)
        values, slopes, worth = found[own].tolist(), grad[own].tolist(), scores[own].tolist()
        first += span.before
        order = sorted(range(span.before), key=lambda i: -worth[i])
        if span.before <= 1:
            assert values == [1.0] * span.before
            assert slopes == [0.0] * span.before
            continue
        spread = torch.tensor(worth, dtype=torch.float64).std().item()
        for rank, i in enumerate(order):
            assert values[i] > 0.5 if rank < span.after else values[i] < 0.5
            expected = values[i] * (1 - values[i]) / (max(spread, 0.01 * sum(worth) / len(worth)) * temperature)
            assert slopes[i] == pytest.approx(expected, rel=1e-6)


def test_the_published_schedule_takes_64_of_576_tokens_through_a_layer():
    """The published script's counts, 215, 10, 5 and 1, are 64 (as its name says) on average over 32 layers."""
    plan = HiDrop().plan([SegmentLayout(600, (ImageSpan(1, 576),), (590,))], 32)
    counts = [boundary.spans[0].after for boundary in plan.boundaries]
    assert counts == [0, 576, 215, 10, 5, 1, 0]
    layers = [stage.end_layer - stage.first_layer for stage in plan.stages]
    assert sum(n * own for n, own in zip([576, *counts], layers, strict=True)) / 32 == 64.0


@pytest.mark.parametrize(
    ("num_layers", "expected"), [(2, [0, 1]), (6, [0, 2, 3, 4]), (8, [0, 2, 3, 4, 6]), (32, [0, 8, 10, 14, 16, 18, 24])]
)
def test_any_depth(num_layers, expected):
    drops = HiDrop().drops(num_layers)
    assert [drop.layer for drop in drops] == expected
    assert [drop.returns for drop in drops] == [False, True, *[False] * (len(drops) - 2)]
    assert HiDrop().for_budget(0.5, num_layers).input_share(num_layers) == pytest.approx(0.5, abs=2e-3)
    assert len(HiDrop().drops(40)) == 7


def test_tokens_leave_later_before_they_enter_earlier():
    found = HiDrop().for_budget(0.74, 32)
    assert (found.enter, found.leave) == (None, 32)
    assert HiDrop().for_budget(0.76, 32).enter == 7


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": (0.5, 0.2)}, "has 2 entries, but the default layers"),
        ({"enter": -1}, "enter=-1"),
        ({"temperature": 0}, "temperature=0"),
        ({"differentiable": 2}, "differentiable=2"),
    ],
)
def test_settings_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        HiDrop(**wrong)
    with pytest.raises(ValueError, match="none of the 6 layers would process visual tokens"):
        HiDrop(enter=4, leave=3).drops(6)
    with pytest.raises(ValueError, match="must lie between enter=2 and leave=4"):
        HiDrop(layers=(2, 3), keep=(0.5, 0.2)).drops(6)
