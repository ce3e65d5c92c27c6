"""EVS, VidCom2, DyCoke and PruneVid against loops written from the papers, and what they share: images stay whole, a
batch is its samples, nothing waits, gradients flow."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.support.fake_cuda import READ, FakeCuda
from tests.support.helpers import tiny_model
from tests.support.packed import random_batch
from tests.support.passes import check_singly, fast, text_model_of
from tests.support.slow_video import (
    CLIPS,
    SAMPLES,
    Clip,
    Scene,
    layouts,
    slow_dycoke,
    slow_evs,
    slow_prunevid,
    slow_scenes,
    slow_vidcom2,
    video,
)  # fmt: skip
from vtprune_train import DivPrune, DyCoke, PruneVid, PyramidDrop, VidCom2, prune
from vtprune_train.core.plan import counts_per_stage
from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.pruning.combined import Combined
from vtprune_train.pruning.methods.evs import EVS, changes
from vtprune_train.pruning.methods.plphp import PLPHP
from vtprune_train.pruning.methods.prunevid import frame_clusters, merged_places, merged_sets
from vtprune_train.pruning.ops.scenes import scenes_of
from vtprune_train.pruning.ops.videos import steps_of

SELECTING = [(EVS, slow_evs), (VidCom2, slow_vidcom2), (DyCoke, slow_dycoke)]
METHODS = [EVS(keep=0.3), VidCom2(keep=0.3), DyCoke(keep=0.3), PruneVid(tau=0.5), PruneVid(keep=0.3, tau=0.5)]
SHARES = st.integers(50, 1000).map(lambda thousandths: thousandths / 1000)
BATCH = [[Clip(8, 4, 5)], [Clip(0, 3, 3), Clip(5, 2, 3, newline=True)], [], [Clip(1, 2, 2)]]
EACH = pytest.mark.parametrize("method", METHODS, ids=repr)


@pytest.mark.parametrize(("cls", "slow"), SELECTING, ids=lambda value: value.__name__)
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), SAMPLES, SHARES)
def test_a_selection_equals_the_loops(cls, slow, seed, samples, keep):
    method = cls(keep=keep)
    scene = Scene(method, samples, seed)
    selection = method.choose(scene.candidates())
    assert selection.at is None and selection.counts is None
    for clip, (tokens, chosen, _) in zip(scene.clips, scene.of_clips(selection), strict=True):
        if not clip.frames:
            assert chosen == list(range(clip.tokens)), "images stay whole"
            continue
        frames = tokens[: clip.frames * clip.places].unflatten(0, (clip.frames, clip.places))
        expected = [frame * clip.places + place for frame, place in slow(frames, keep)]
        assert chosen == expected + [clip.tokens - 1] * clip.newline


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), SAMPLES, st.floats(0.3, 0.95), SHARES, SHARES)
def test_prunevid_equals_the_loops(seed, samples, tau, segments, clusters):
    method = PruneVid(tau=tau, segments=segments, clusters=clusters)
    scene = Scene(method, samples, seed)
    selection = method.choose(scene.candidates())
    for clip, (tokens, chosen, contents) in zip(scene.clips, scene.of_clips(selection), strict=True):
        if not clip.frames:
            assert chosen == list(range(clip.tokens)) and torch.equal(contents, tokens)
            continue
        frames = tokens[: clip.frames * clip.places].unflatten(0, (clip.frames, clip.places))
        merged = slow_prunevid(frames, tau, segments, clusters)
        centres = [frame * clip.places + place for (frame, place), _ in merged]
        assert chosen == centres + [clip.tokens - 1] * clip.newline
        torch.testing.assert_close(contents[: len(merged)], torch.stack([content for _, content in merged]))
        assert torch.equal(contents[len(merged) :], tokens[clip.frames * clip.places :])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=14))
def test_scenes(labels):
    scenes = scenes_of(np.array(labels))
    assert [end - start for start, end in scenes] == slow_scenes(labels)
    assert [start for start, _ in scenes] == [0, *(end for _, end in scenes[:-1])]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), CLIPS.filter(lambda clip: clip.frames), SHARES, st.floats(0, 1))
def test_prunevid_with_a_fixed_share_keeps_exactly_that(seed, clip, keep, tau):
    """Also where more would merge over time than the share allows."""
    method = PruneVid(keep=keep, tau=tau)
    scene = Scene(method, [[clip]], seed)
    selection = method.choose(scene.candidates())
    of_frames = clip.frames * clip.places
    assert selection.counts is None
    assert len(selection.chosen) == max(1, round(keep * 1000) * of_frames // 1000) + clip.newline
    if keep == 1.0:
        assert selection.chosen.tolist() == list(range(clip.tokens))
        assert torch.equal(selection.values, scene.hidden[:of_frames]), "nothing merged, nothing changed"


def test_scenes_and_clusters_do_not_depend_on_rounded_means():
    """In bfloat16, means of frames and of places that change little would round to the same values."""
    generator = torch.Generator().manual_seed(2)
    frames = (8 + 0.05 * torch.randn(12, 40, 16, generator=generator)).to(torch.bfloat16)
    exact = frames.float()
    assert torch.equal(frame_clusters(frames, 0.5), frame_clusters(exact, 0.5))
    sets = [((0, 12), np.arange(40))]
    found, expected = merged_sets(frames, sets, [10]), merged_sets(exact, sets, [10])
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1].to(torch.bfloat16))


def test_the_most_similar_places_merge_first():
    still = np.array([[0.9, 0.7, 0.95], [0.8, 0.99, 0.2]])
    scenes = [(0, 3), (3, 5)]  # a place that merges saves two tokens in the first scene, and one in the second
    assert merged_places(scenes, still, 0.75).tolist() == [[True, False, True], [True, True, False]]
    assert merged_places(scenes, still, 0.75, spare=3).tolist() == [[False, False, True], [False, True, False]]
    assert not merged_places(scenes, still, 0.75, spare=0).any()


def test_places_merge_as_long_as_the_fixed_share_allows():
    """Of a still video of 4 frames with 4 places, 9 tokens too many: 3 places merge, and the other one stays."""
    scene = Scene(PruneVid(keep=7 / 16, segments=0.25), [[Clip(4, 2, 2, newline=True)]])
    still = torch.eye(16, dtype=torch.float64)[:4] + 1
    scene.hidden = torch.cat([still, still, still, still, scene.hidden[-1:]])
    selection = PruneVid(keep=7 / 16, segments=0.25).choose(scene.candidates())
    assert selection.chosen.tolist() == [0, 1, 2, 3, 7, 11, 15, 16]


def test_sets_of_up_to_14_tokens_are_not_clustered():
    for places, merged in ((14, 14), (15, 7)):
        scene = Scene(PruneVid(), [[Clip(1, 1, places)]])
        assert PruneVid().choose(scene.candidates()).counts.tolist() == [merged]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [0.1, 0.3, 0.7, 1.0])
def test_evs_selects_what_transformers_selects(keep, dtype):
    """The same function as in vLLM; in half precision many changes are equal, and the earlier tokens stay."""
    module = pytest.importorskip("transformers.models.nemotron_h_omni.modeling_nemotron_h_omni")
    frames = video(3, 9, 40).to(dtype)
    method = EVS(keep=keep)
    scene = Scene(method, [[Clip(9, 5, 8)]])
    scene.hidden = frames.flatten(0, 1)
    mask = module.compute_retention_mask(
        video_embeds=scene.hidden, thw=(9, 10, 16), spatial_merge_size=2, q=round(1 - keep, 3)
    )
    assert method.choose(scene.candidates()).chosen.tolist() == mask.nonzero().flatten().tolist()
    if dtype == torch.bfloat16:
        assert len(changes(frames).unique()) < 8 * 40, "no ties: the case is not met"


@pytest.mark.parametrize(("keep", "frames", "places", "kept"), [(0.7, 10, 9, 62), (0.3, 10, 9, 27), (0.05, 10, 9, 9)])
def test_evs_counts_as_vllm(keep, frames, places, kept):
    """``int(n * (1 - q))`` in floating point, and at least a frame."""
    (boundary,) = EVS(keep=keep).plan(layouts([[Clip(frames, 1, places)]]), 4).boundaries
    assert [span.after for span in boundary.spans] == [kept]


@EACH
@pytest.mark.parametrize(
    "span",
    [
        ImageSpan(1, 12, ((3, 4),)),
        ImageSpan(1, 12, (), frames=3),
        ImageSpan(1, 12, ((2, 3), (2, 2), (1, 2)), frames=3),
        ImageSpan(1, 12, ((2, 2), (2, 2)), frames=2),
        ImageSpan(1, 0, ((0, 0), (0, 0)), frames=2),
    ],
    ids=["an image", "without grids", "frames of several sizes", "grids of fewer tokens", "empty frames"],
)
def test_what_has_no_known_steps_stays_whole(method, span):
    boundary = method.plan([SegmentLayout(16, (span,), (14,), (15,))], 4).boundaries[0]
    assert steps_of(span, span.length) is None
    assert [layout.after for layout in boundary.spans] == [span.length]
    scene = Scene(method, [[]])
    scene.boundary = boundary
    selection = method.choose(scene.candidates(torch.randn(span.length, 8)))
    assert selection.chosen.tolist() == list(range(span.length)) and selection.counts is None


@EACH
def test_after_an_earlier_drop_a_method_for_videos_is_refused(method):
    with pytest.raises(ValueError, match=f"{method.name} compares .* divprune drops .* list {method.name}"):
        Combined((DivPrune(keep=0.5), method)).drops(4)
    with pytest.raises(ValueError, match=f"{method.name} compares whole frames .* remove one of them"):
        Combined((EVS(keep=0.5), method)).drops(4)
    assert len(Combined((method, DivPrune(keep=0.5))).drops(4)) == 2


@EACH
def test_removing_keys_is_refused_if_it_divides_the_video(method):
    """Text between the frames divides a video into spans of one frame, of which nothing would be dropped."""
    grids, runs = ((2, 5),) * 3, tuple((2 + 12 * step, 10) for step in range(3))
    with_text = SegmentLayout(40, (ImageSpan(2, 30, grids, 3, runs),), (37,), (38,))
    adjacent = SegmentLayout(40, (ImageSpan(2, 30, grids, 3),), (37,), (38,))
    combined = Combined((method, PLPHP()))
    with pytest.raises(ValueError, match=f"{method.name} compares the frames of a video, but .* removes keys"):
        combined.plan([with_text], 8)
    assert combined.plan([adjacent], 8).boundaries[0].spans == method.plan([adjacent], 8).boundaries[0].spans
    assert len(method.plan([with_text], 8).boundaries[0].spans) == 1
    one_frame = SegmentLayout(40, (ImageSpan(2, 10, grids[:1], 1, runs[:1]),), (37,), (38,))
    combined.plan([one_frame], 8)
    if method.name in ("vidcom2", "prunevid"):
        per_frame = Combined((replace(method, per="frame"), PLPHP(per="frame")))
        assert len(per_frame.plan([with_text], 8).boundaries[0].spans) == 3


@EACH
def test_a_batch_is_its_samples(method):
    segments = layouts(BATCH)
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(sum(s.length for s in segments), 32, generator=generator, dtype=torch.float64)
    check_singly(text_model_of(), method, segments, embeds)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize(
    "method", [EVS(keep=1.0), VidCom2(keep=1.0), DyCoke(keep=1.0), PruneVid(keep=1.0)], ids=lambda m: m.name
)
def test_everything_kept_is_the_dense_model(method, positions):
    segments = layouts(BATCH)
    embeds = torch.randn(sum(s.length for s in segments), 32, dtype=torch.float64)
    text_model = text_model_of()
    hidden, _ = fast(text_model, replace(method, positions=positions), segments, embeds)
    dense, _ = fast(text_model, PyramidDrop(layers=(2,), keep=(1.0,)), segments, embeds)
    torch.testing.assert_close(hidden, dense, rtol=1e-12, atol=1e-12)


@EACH
def test_only_prunevid_waits_for_the_device(method):
    """Twice for all videos: for the clusters of frames, and for the places that do not change."""
    scene = Scene(method, BATCH)
    expected = method.choose(scene.candidates()).chosen
    with FakeCuda() as cuda:
        selection = method.choose(cuda.put(scene.candidates()))
    assert torch.equal(selection.chosen.elem, expected)
    assert [event.kind for event in cuda.waits] == ([READ] * 2 if method.name == "prunevid" else [])


@EACH
def test_images_alone_wait_for_nothing(method):
    scene = Scene(method, [[Clip(0, 3, 3)], []])
    with FakeCuda() as cuda:
        method.choose(cuda.put(scene.candidates()))
    assert cuda.waits == []


@EACH
def test_gradients_reach_what_stays_and_what_merges(method):
    scene = Scene(method, [[Clip(6, 4, 5, newline=True)], [Clip(0, 2, 2)]])
    hidden = scene.hidden.clone().requires_grad_()
    selection = method.choose(scene.candidates(hidden))
    states = hidden.index_select(0, selection.chosen)
    if selection.at is not None:
        states = states.index_copy(0, selection.at, selection.values)
    states.sum().backward()
    reached = set(hidden.grad.abs().sum(dim=1).nonzero().flatten().tolist())
    assert reached == set(range(len(hidden)) if method.name == "prunevid" else selection.chosen.tolist())
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("later", [None, PyramidDrop(layers=(2,), keep=(0.5,))], ids=["alone", "and a later drop"])
@EACH
def test_a_model_trains_with_it(method, later):
    """What an adaptive method leaves is what the next one finds."""
    method = method if later is None else Combined((method, later))
    model = prune(tiny_model(), method).train()
    batch = random_batch(model, layouts(BATCH))
    batch.plan = method.plan(layouts(BATCH), 6)
    output = model(batch)
    output.loss_sum.backward()
    spans = output.plan.boundaries[0].spans
    assert spans[1].after == 9 and all(0 < span.after <= span.before for span in spans)
    assert spans[0].after < spans[0].before
    assert output.plan.stages[1].num_tokens < batch.plan.stages[0].num_tokens
    assert model.model.multi_modal_projector.linear_1.weight.grad.any()
    if later is not None:
        assert [span.before for span in output.plan.boundaries[1].spans] == [span.after for span in spans]


@settings(max_examples=50, deadline=None)
@given(CLIPS, SHARES)
def test_plans_agree_with_what_is_counted_for_budgets(clip, keep):
    """A long video keeps the share that the budget counts, up to the rounding of each frame."""
    assume(clip.frames)
    long = replace(clip, frames=4 * clip.frames, newline=False)
    for method in (EVS(keep=keep), VidCom2(keep=keep), DyCoke(keep=keep), PruneVid(keep=keep)):
        (after,) = (span.after for span in method.plan(layouts([[long]]), 4).boundaries[0].spans)
        (planned,) = counts_per_stage(method.drops(4), [long.tokens])[1]
        assert planned - long.frames - 1 <= after <= max(planned, long.frames, long.places)


@pytest.mark.parametrize("cls", [EVS, VidCom2, DyCoke, PruneVid])
def test_budgets_and_settings(cls):
    assert cls().for_budget(0.4, 8).input_share(8) == pytest.approx(0.4, abs=1e-3)
    assert 0 < cls(keep=0.3).selector_flops(64, cls(keep=0.3).plan(layouts(BATCH), 4).boundaries[0]) < 1e9
    assert cls(keep=0.3).selector_flops(64, cls(keep=0.3).plan(layouts([[Clip(0, 3, 3)]]), 4).boundaries[0]) == 0
    assert cls(keep=0.5).eased(1.0, 0.5).keep == 0.75
    with pytest.raises(ValueError, match=r"keep=1.5 is not in \(0, 1\]"):
        cls(keep=1.5)
    with pytest.raises(ValueError, match="positions='later' is not one of renumber, keep"):
        cls(positions="later")


def test_vidcom2_keeps_a_token_of_every_frame():
    """Budgets are rounded for each frame: 64 times 2 of 12 tokens are more than the share of 0.15, 115 tokens."""
    scene = Scene(VidCom2(keep=0.15), [[Clip(64, 3, 4)]])
    kept = VidCom2(keep=0.15).choose(scene.candidates()).chosen
    assert len(kept) == 115 < 64 * 2
    assert len((kept // 12).unique()) == 64


def test_more_settings():
    for cls in (EVS, DyCoke):
        with pytest.raises(ValueError, match=r"per='frame' has no meaning for \w+, which compares the frames"):
            cls(per="frame")
    boundary = VidCom2(keep=0.5, per="frame").plan(layouts([[Clip(3, 2, 2, newline=True)]]), 4).boundaries[0]
    assert [span.after for span in boundary.spans] == [2, 2, 3]
    with pytest.raises(ValueError, match=r"out of range for dycoke on 8 layers, which reaches 0.250 to 1.000"):
        DyCoke().for_budget(0.1, 8)
    assert DyCoke().input_share(8) == pytest.approx(0.475)
    assert PruneVid().drops(8)[0].adaptive and not PruneVid(keep=0.2).drops(8)[0].adaptive
    with pytest.raises(ValueError, match=r"tau=1.5 is not in \[-1, 1\]"):
        PruneVid(tau=1.5)
    with pytest.raises(ValueError, match=r"segments=0 is not in \(0, 1\]"):
        PruneVid(segments=0)
    with pytest.raises(ValueError, match="no keep ratios"):
        PruneVid().eased(1.0, 0.5)
