"""FastV against a slow reading of the paper."""

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
    random_batch_of,
    ranking_rows,
    text_model_of,
)
from tests.support.reference import attention_rows, queries_and_keys, run_layer
from vtprune_train.core.rounding import floor_of
from vtprune_train.pruning.methods.fastv import FastV


def slow_fastv(layer_k, keep):
    def run(text_model, segment, embeds):
        theta = text_model.config.rope_parameters["rope_theta"]
        positions, x, alive = torch.arange(len(embeds)), embeds, list(range(len(embeds)))
        weights = torch.zeros(0)
        for index, layer in enumerate(text_model.layers):
            if index == layer_k:
                received = torch.zeros(len(alive), dtype=x.dtype)
                rows = ranking_rows(segment, alive)
                for head in weights:
                    for row in rows:
                        received += head[row] / (len(weights) * len(rows))
                worth = dict(zip(alive, received.tolist(), strict=True))
                stay = best_of_each(segment, alive, worth, lambda image, _: floor_of(keep, segment.spans[image].length))
                x = x[[alive.index(offset) for offset in stay]]
                alive = stay
            if index == layer_k - 1:
                weights = attention_rows(*queries_and_keys(layer, x, positions, theta))  # what the layer itself does
            x = run_layer(layer, x, positions[alive], theta)
        return x, [alive]

    return run


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), SHAPES, DECODERS, st.sampled_from([1, 2, 5]), st.sampled_from([0.5, 0.2, 1.0]))
def test_against_the_paper(seed, shapes, decoder, layer, keep):
    segments, embeds = random_batch_of(seed, shapes)
    check_against(
        slow_fastv(layer, keep), text_model_of(seed, decoder), FastV(layer=layer, keep=keep), segments, embeds
    )


def test_a_batch_is_its_samples():
    segments, embeds = random_batch_of(3, [(1, 1), (0, 2), (3, 2)])
    for settings_ in ({}, {"rank_with": "next_layer"}, {"positions": "renumber"}):
        check_singly(text_model_of(), FastV(**settings_), segments, embeds)


@pytest.mark.parametrize(("num_layers", "layer"), [(2, 1), (6, 1), (8, 1), (32, 2), (40, 2)])
def test_any_depth(num_layers, layer):
    assert [drop.layer for drop in FastV().drops(num_layers)] == [layer]
    assert FastV().for_budget(0.6, num_layers).input_share(num_layers) == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": 0}, "keep=0 is not in"),
        ({"layer": 0}, "layer=0 should be greater than 0"),
        ({"rank_with": "both"}, "rank_with='both' is not one of"),
        ({"positions": "none"}, "positions='none'"),
    ],
)
def test_settings_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        FastV(**wrong)
    with pytest.raises(ValueError, match="layer=9 does not fit a decoder of 6 layers"):
        FastV(layer=9).drops(6)
