"""VideoLLM-MoD: routers let tokens into a layer, the rest skip it; against one written with loops."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.helpers import tiny_model
from tests.support.slow_learned import compared, random_video, slow_mod
from vtprune_train import prune
from vtprune_train.core.plan import counts_per_stage
from vtprune_train.core.stream import ImageSpan
from vtprune_train.pruning.methods.videollm_mod import VideoLLMMoD, gate


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 9999),
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
    st.sampled_from([None, (0,), (2,), (1, 2, 3), (0, 4)]),
    st.floats(0.05, 0.99),
    st.sampled_from([1, 2, 4]),
)
def test_equals_the_loops(seed, images, layers, keep, kv_heads):
    def slow(text_model, module, embeds, segment):
        routers = {int(name): router.weight[0] for name, router in module.items()}
        return slow_mod(text_model, embeds, segment.spans, routers, keep)

    compared(VideoLLMMoD(layers=layers, keep=keep), images, seed, kv_heads, slow)


def test_every_router_learns():
    def slow(text_model, module, embeds, segment):
        routers = {int(name): router.weight[0] for name, router in module.items()}
        return slow_mod(text_model, embeds, segment.spans, routers, 0.5)

    gradients = compared(VideoLLMMoD(layers=(1, 3), keep=0.5), [3, 2], 1, 2, slow)
    assert gradients[1].abs().sum() > 0 and gradients[2].abs().sum() > 0


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_a_video_is_routed_as_a_whole(keep):
    """Frames compete for the tokens that a layer takes, and every router learns from videos."""

    def slow(text_model, module, embeds, segment):
        routers = {int(name): router.weight[0] for name, router in module.items()}
        return slow_mod(text_model, embeds, segment.spans, routers, keep)

    gradients = compared(VideoLLMMoD(layers=(1, 3), keep=keep), [5, 0, 1, 3], 4, 2, slow, sample=random_video)
    assert gradients[1].abs().sum() > 0 and gradients[2].abs().sum() > 0


def test_frames_as_spans_are_routed_one_by_one():
    """As the paper does: each frame keeps its share, whatever the others score."""

    def frame_by_frame(rng, frames):
        segment = random_video(rng, frames)
        spans = tuple(ImageSpan(2 + 6 * frame, 6, ((2, 3),), frames=1) for frame in range(frames))
        return replace(segment, spans=spans)

    def slow(text_model, module, embeds, segment):
        routers = {int(name): router.weight[0] for name, router in module.items()}
        return slow_mod(text_model, embeds, segment.spans, routers, 0.34)

    method = VideoLLMMoD(layers=(1, 3), keep=0.34)
    compared(method, [5, 0, 3], 4, 2, slow, sample=frame_by_frame)
    segment = frame_by_frame(np.random.default_rng(0), 5)
    assert [span.after for span in method.plan([segment], 6).boundaries[0].spans] == [2] * 5


@pytest.mark.parametrize("num_layers", [2, 6, 8, 32, 40])
def test_every_second_layer(num_layers):
    drops = VideoLLMMoD().drops(num_layers)
    routed = [drop.layer for drop in drops[::2]]
    assert routed == ([0] if num_layers == 2 else list(range(1, num_layers - 1, 2)))
    assert [drop.layer for drop in drops[1::2]] == [layer + 1 for layer in routed]
    assert all(drop.returns for drop in drops[1::2])
    assert [counts.tolist() for counts in counts_per_stage(drops, [100, 4])] == [
        [100, 4],
        *([20, 0], [100, 4]) * len(routed),
    ]


def test_nothing_skips_at_keep_1():
    method = VideoLLMMoD(keep=1.0)
    assert method.drops(6) == ()
    assert method.module(32, 6) is None
    assert VideoLLMMoD().eased(1.0, 0.0) == method
    assert VideoLLMMoD().eased(1.0, 0.5).keep == pytest.approx(0.6)


def test_a_rating_of_0_changes_nothing():
    assert gate(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]


def test_budgets():
    assert VideoLLMMoD().for_budget(0.6, 32).input_share(32) == pytest.approx(0.6, abs=1e-3)
    found = VideoLLMMoD().for_budget(0.25, 32)
    assert found.layers == tuple(range(1, 31)) and found.keep == pytest.approx(0.2, abs=1e-3)
    with pytest.raises(ValueError, match=r"out of range for videollm_mod on 32 layers, which reaches 0\.531"):
        VideoLLMMoD(layers=tuple(range(1, 31, 2))).for_budget(0.25, 32)


@pytest.mark.parametrize(
    ("settings_", "said"),
    [
        ({"keep": 0}, "keep=0"),
        ({"keep": 1.2}, "keep=1.2"),
        ({"layers": [3, 3]}, "layers="),
        ({"layers": []}, "layers="),
    ],
)
def test_wrong_settings(settings_, said):
    with pytest.raises(ValueError, match=said):
        VideoLLMMoD(**settings_)


def test_a_last_layer_is_refused():
    with pytest.raises(ValueError, match="router of layer 5 decides, because the decoder has 6 layers"):
        prune(tiny_model(), VideoLLMMoD(layers=(5,)))
