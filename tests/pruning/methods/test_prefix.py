"""Prefix: learned tokens before each image, after another method has dropped; against one written with loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.helpers import tiny_model
from tests.support.reference import run_layer
from tests.support.slow_learned import compared, theta
from vtprune_train import Combined, DivPrune, Drop, Needs, PruningMethod, PyramidDrop, prune
from vtprune_train.core.stream import SpanLayout
from vtprune_train.pruning import method_from_settings
from vtprune_train.pruning.learned import joined
from vtprune_train.pruning.methods.prefix import Prefix

COUNTS = st.lists(st.integers(1, 9), max_size=5)


@settings(max_examples=25, deadline=None)
@given(COUNTS, st.integers(1, 4))
def test_the_prefix_stands_before_each_image(lengths, number):
    spans = [SpanLayout(0, i, length, length, length + number) for i, length in enumerate(lengths)]
    chosen, at = joined(spans, number, sum(lengths), torch.device("cpu"), before=True)
    expected, new, token = [], [], 0
    for length in lengths:
        new += range(len(expected), len(expected) + number)
        expected += [token] * number + list(range(token, token + length))
        token += length
    assert chosen.tolist() == expected and at.tolist() == new


class FirstHalf(PruningMethod):
    """Keeps the first half of each image, before the decoder."""

    @property
    def needs(self):
        return Needs(positions="renumber")

    def drops(self, num_layers):
        return (Drop(0, 0.5),)

    def score(self, candidates):
        return -torch.arange(len(candidates.hidden)).float()


def slow(text_model, embeds, spans, prefix):
    """Each image keeps the first half of its tokens, after ``prefix``; positions count the remaining tokens."""
    rows = []
    for offset in range(len(embeds)):
        inside = [span for span in spans if span.start <= offset < span.end]
        if not inside:
            rows.append(embeds[offset])
        elif offset == inside[0].start:
            kept = inside[0].length // 2
            rows += list(prefix) * (kept > 0) + [embeds[offset + place] for place in range(kept)]
    x = torch.stack(rows)
    for layer in text_model.layers:
        x = run_layer(layer, x, torch.arange(len(x)), theta(text_model))
    return x


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 9999), st.lists(st.integers(0, 3), min_size=1, max_size=3), st.integers(1, 4))
def test_equals_the_loops(seed, images, tokens):
    def by_loops(text_model, module, embeds, segment):
        return slow(text_model, embeds, segment.spans, next(module.parameters()))

    method = Combined((FirstHalf(), Prefix(tokens=tokens)))
    compared(method, images, seed, 2, by_loops)


@pytest.mark.parametrize("others", [(PyramidDrop(),), (DivPrune(),)])
def test_no_method_drops_the_prefix(others):
    with pytest.raises(ValueError, match=r"drops tokens before layer .* learned tokens of prefix"):
        Combined((Prefix(), *others)).drops(8)


def test_only_the_prefix_is_learned_and_it_has_no_budget():
    method = method_from_settings({"method": [{"method": "divprune", "keep": 0.1}, "prefix"]})
    assert method == Combined((DivPrune(keep=0.1), Prefix(tokens=4)))
    model = prune(tiny_model(), method)
    learned = {name: value.shape for name, value in model.named_parameters() if ".pruning." in name}
    assert list(learned.values()) == [(4, model.config.text_config.hidden_size)]
    with pytest.raises(ValueError, match="prefix drops no tokens"):
        Prefix().for_budget(0.5, 8)
    assert method.for_budget(0.3, 8).methods[0].keep == pytest.approx(0.3, abs=1e-3), "the prefix adds four tokens"
