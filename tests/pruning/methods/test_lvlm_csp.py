"""LVLM_CSP against a slow reading of what is known of the paper."""

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
from vtprune_train.pruning.methods.lvlm_csp import LVLMCSP, clusters, representatives


def slow_csp(back, prune, keep, scatter):
    def run(text_model, segment, embeds):
        theta = text_model.config.rope_parameters["rope_theta"]
        positions, everyone = torch.arange(len(embeds)), list(range(len(embeds)))
        stands_for = {}  # visual token -> its representative
        for span in segment.spans:
            count = max(1, floor_of(keep[0], span.length))
            for offset in range(span.start, span.end):
                number = min((offset - span.start) // (span.length // count), count - 1)
                stands_for[offset] = span.start + number * (span.length // count)
        alive = [offset for offset in everyone if stands_for.get(offset, offset) == offset]
        x, stages = embeds[alive], [alive]
        for index, layer in enumerate(text_model.layers):
            if index == back:
                now = dict(zip(alive, x, strict=True))
                rows = []
                for offset in everyone:
                    leader = stands_for.get(offset, offset)
                    if offset in now:
                        rows.append(now[offset])
                    elif scatter == "cluster":
                        rows.append(embeds[offset] + now[leader] - embeds[leader])
                    else:
                        rows.append(embeds[offset])
                alive, x = everyone, torch.stack(rows)
                stages.append(alive)
            if index == prune:
                weights = attention_rows(*queries_and_keys(layer, x, positions[alive], theta)).mean(dim=0)
                worth = weights[ranking_rows(segment, alive)].mean(dim=0).tolist()
                alive = best_of_each(
                    segment, alive, worth, lambda image, _: max(1, floor_of(keep[1], segment.spans[image].length))
                )
                x = x[alive]
                stages.append(alive)
            x = run_layer(layer, x, positions[alive], theta)
        return x, stages

    return run


@settings(max_examples=8, deadline=None)
@given(
    st.integers(0, 10_000),
    SHAPES,
    DECODERS,
    st.sampled_from([(1, 2), (2, 4), (5, 6)]),
    st.sampled_from([(0.3, 0.2), (0.05, 0.5), (0.7, 0.01)]),
    st.sampled_from(["own", "cluster"]),
)
def test_against_the_paper(seed, shapes, decoder, layers, keep, scatter):
    segments, embeds = random_batch_of(seed, shapes)
    method = LVLMCSP(layers=layers, keep=keep, scatter=scatter)
    check_against(slow_csp(*layers, keep, scatter), text_model_of(seed, decoder), method, segments, embeds)


def test_clusters():
    assert representatives(10, 3).tolist() == [0, 3, 6]
    assert clusters(10, 3).tolist() == [0, 0, 0, 3, 3, 3, 6, 6, 6, 6]
    assert clusters(4, 4).tolist() == [0, 1, 2, 3]
    assert clusters(0, 0).tolist() == []


@pytest.mark.parametrize("scatter", ["own", "cluster"])
def test_a_batch_is_its_samples(scatter):
    segments, embeds = random_batch_of(9, [(3, 2), (0, 1), (1, 1)])
    check_singly(text_model_of(), LVLMCSP(layers=(2, 4), scatter=scatter), segments, embeds)


@pytest.mark.parametrize(
    ("num_layers", "layers"), [(2, [0, 1]), (6, [0, 2, 4]), (8, [0, 3, 5]), (32, [0, 12, 20]), (40, [0, 15, 25])]
)
def test_any_depth(num_layers, layers):
    assert [drop.layer for drop in LVLMCSP().drops(num_layers)] == layers
    assert LVLMCSP().for_budget(0.6, num_layers).input_share(num_layers) == pytest.approx(0.6, abs=2e-3)


def test_the_defaults_save_what_the_paper_reports():
    assert LVLMCSP().input_share(32) == pytest.approx(0.35, abs=0.005)
    assert LVLMCSP().for_budget(0.1, 32).input_share(32) == pytest.approx(0.1, abs=2e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": (0.5,)}, "a list of 2"),
        ({"keep": (0.5, 0)}, "keep=0 is not in"),
        ({"layers": (4, 2)}, "increasing layers"),
        ({"scatter": "mean"}, "scatter='mean'"),
    ],
)
def test_settings_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        LVLMCSP(**wrong)
    with pytest.raises(ValueError, match="would never return"):
        LVLMCSP(layers=(6, 7)).drops(6)
    with pytest.raises(ValueError, match=r"layers=\[2, 7\]: in a decoder of 6 layers the tokens would never be pruned"):
        LVLMCSP(layers=(2, 7)).drops(6)
