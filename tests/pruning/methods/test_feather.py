"""FEATHER against a slow reading of the paper and its code."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.helpers import tiny_model
from tests.support.passes import (
    DECODERS,
    SHAPES,
    best_of_each,
    check_against,
    check_singly,
    fast,
    image_of,
    random_batch_of,
    ranking_rows,
    text_model_of,
)
from tests.support.reference import run_layer
from vtprune_train.core.plan import plan_stream
from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.models.forward.attention import PREFIX
from vtprune_train.models.forward.decoder import run_layers
from vtprune_train.pruning.candidates import Ranking
from vtprune_train.pruning.methods.feather import Feather
from vtprune_train.pruning.ops.scoring import visual_query_attention


def on_the_grid(span, stride):
    """Offsets of every stride-th token of every stride-th row; in one row, one of as many as in a square."""
    found, cell = set(), span.start
    for rows, columns in span.grids or ((1, span.length),):
        for row in range(rows):
            for column in range(columns):
                if (column % stride**2 == 0) if rows == 1 else (row % stride == 0 and column % stride == 0):
                    found.add(cell)
                cell += 1
    return found


def slow_feather(layers, keep, stride):
    """The published order of things: the grid is added to the best ``m``, with the m that gives the planned count."""

    def attention_to_images(layer, x, segment, alive):
        """Mean over heads and ranking rows of a softmax over one image's keys, nothing rotated."""
        normed, attention = layer.input_layernorm(x), layer.self_attn
        q = attention.q_proj(normed).view(len(x), -1, attention.head_dim)
        k = attention.k_proj(normed).view(len(x), -1, attention.head_dim)
        group = q.shape[1] // k.shape[1]
        rows, worth = ranking_rows(segment, alive), {}
        for image in range(len(segment.spans)):
            places = [place for place, offset in enumerate(alive) if image_of(segment, offset) == image]
            for place in places:
                worth[alive[place]] = 0.0
            for row in rows:
                if not places or places[0] > row:
                    continue
                for head in range(q.shape[1]):
                    logits = [float(q[row, head] @ k[p, head // group]) / math.sqrt(q.shape[2]) for p in places]
                    total = sum(math.exp(logit - max(logits)) for logit in logits)
                    for place, logit in zip(places, logits, strict=True):
                        worth[alive[place]] += math.exp(logit - max(logits)) / total / q.shape[1] / len(rows)
        return worth

    def run(text_model, segment, embeds):
        theta = text_model.config.rope_parameters["rope_theta"]
        positions, x, alive, stages = torch.arange(len(embeds)), embeds, list(range(len(embeds))), []
        worth = {}
        for index, layer in enumerate(text_model.layers):
            if index in layers:
                ratio = keep[layers.index(index)]
                counts = [int(span.length * ratio) for span in segment.spans]
                if index == layers[0]:
                    stay = [offset for offset in alive if image_of(segment, offset) is None]
                    for image, span in enumerate(segment.spans):
                        order = sorted(range(span.start, span.end), key=lambda o: (-worth[o], o))
                        grid = on_the_grid(span, stride)
                        sizes = [len(grid | set(order[:m])) for m in range(span.length + 1)]
                        stay += sorted(grid | set(order[: sizes.index(counts[image])]))
                    stay.sort()
                else:
                    stay = best_of_each(segment, alive, worth, lambda image, _, counts=counts: counts[image])
                x = x[[alive.index(offset) for offset in stay]]
                alive = stay
                stages.append(alive)
            if index + 1 in layers:
                worth = attention_to_images(layer, x, segment, alive)
            x = run_layer(layer, x, positions[alive], theta)
        return x, stages

    return run


def with_grids(segment):
    """Images of two rasters: 4 rows of as many columns as fit, and what is over as a row."""
    spans = [
        ImageSpan(span.start, span.length, ((4, span.length // 4), (1, span.length % 4))) for span in segment.spans
    ]
    return replace(segment, spans=tuple(spans))


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10_000), SHAPES, DECODERS, st.booleans(), st.booleans())
def test_against_the_paper(seed, shapes, decoder, grids, plain):
    segments, embeds = random_batch_of(seed, shapes, plain)
    segments = [with_grids(segment) for segment in segments] if grids else segments
    method = Feather(layers=(2, 4), keep=(0.6, 0.2), stride=2)
    check_against(slow_feather([2, 4], [0.6, 0.2], 2), text_model_of(seed, decoder), method, segments, embeds)


def test_a_row_that_is_an_image_s_last_token_ranks_all_of_it():
    """As in captions without a question."""
    (boundary, _) = Feather().plan([SegmentLayout(14, (ImageSpan(1, 9),), (9,), (10,))], 32).boundaries
    scores = visual_query_attention(Ranking(torch.randn(1, 2, 4), torch.randn(14, 1, 4), 0.5), boundary)
    assert scores.sum() == pytest.approx(1.0)


def test_a_grid_larger_than_what_stays_is_thinned_evenly():
    segment = SegmentLayout(70, (ImageSpan(1, 64, ((8, 8),)),), (66,), (67,))
    (boundary, _) = Feather(layers=(2, 4), keep=(0.0625, 0.03), stride=2).plan([segment], 6).boundaries
    assert boundary.spans[0].after == 4
    floor = Feather(stride=2)._floor(boundary.spans[0])
    assert floor.tolist() == [4, 20, 36, 52]


@pytest.mark.parametrize("rank_with", ["this_layer", "next_layer"])
def test_nothing_is_left_of_a_scaled_rotation(rank_with):
    """YaRN's tables scale what they rotate: the ranking sees what the projections gave all the same."""
    rope = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 512}
    text_model = tiny_model(rope_parameters=rope).double().eval().model.language_model
    text_model.config._attn_implementation = PREFIX + "varlen_sdpa"
    segments, embeds = random_batch_of(0, [(2, 1), (1, 2)])
    seen = []

    class Spy(Feather):
        def score(self, candidates):
            seen.append((candidates.boundary.query_rows, candidates.ranking))
            return super().score(candidates)

    method = Spy(layers=(1, 3), rank_with=rank_with)
    with torch.no_grad():
        dense = run_layers(text_model, embeds, plan_stream(segments, (), 1)).last_hidden_state
        fast(text_model, method, segments, embeds)
        layer, x = (text_model.layers[0], embeds) if rank_with == "this_layer" else (text_model.layers[1], dense)
        normed, attention = layer.input_layernorm(x), layer.self_attn
        rows, ranking = seen[0]
        for found, projection in (
            (ranking.queries, attention.q_proj(normed)[rows]),
            (ranking.keys, attention.k_proj(normed)),
        ):
            torch.testing.assert_close(found.flatten(1), projection, rtol=1e-4, atol=1e-5)


def test_a_batch_is_its_samples():
    segments, embeds = random_batch_of(5, [(2, 1), (0, 1), (1, 3)])
    for settings_ in ({}, {"rank_with": "next_layer"}, {"positions": "renumber"}):
        check_singly(text_model_of(), Feather(layers=(2, 3), keep=(0.5, 0.2), **settings_), segments, embeds)


@pytest.mark.parametrize(("num_layers", "layers"), [(2, [1]), (6, [2, 3]), (8, [2, 4]), (32, [8, 16]), (40, [10, 20])])
def test_any_depth(num_layers, layers):
    assert [drop.layer for drop in Feather().drops(num_layers)] == layers
    for share in (0.9, 0.5):
        assert Feather().for_budget(share, num_layers).input_share(num_layers) == pytest.approx(share, abs=1e-3)


def test_a_small_budget_moves_both_drops_forward():
    found = Feather().for_budget(0.1, 32)
    assert found.input_share(32) == pytest.approx(0.1, abs=1e-3)
    assert found.layers[0] < 8
    with pytest.raises(ValueError, match=r"out of range for feather on 6 layers, which reaches 0\.167 to 1\.000"):
        Feather().for_budget(0.1, 6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": (0.5,)}, "a list of 2"),
        ({"keep": (0.2, 0.5)}, "increases"),
        ({"layers": (4, 2)}, "must increase"),
        ({"stride": 0}, "stride=0"),
    ],
)
def test_settings_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        Feather(**wrong)
