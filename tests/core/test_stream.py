"""Plans, against a simulation token by token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.packed import random_segment
from vtprune_train.core.plan import counts_per_stage, plan_stream
from vtprune_train.core.stream import Drop, ImageSpan, SegmentLayout
from vtprune_train.pruning.ops.selection import next_rows, top_k_per_span

DROPS = (Drop(2, 0.5), Drop(4, 0.3), Drop(5, 0.1))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=5),
    st.booleans(),
)
def test_every_place_is_where_the_tokens_really_are(seed, shapes, plain):
    """Follow labelled tokens through random selections; the plan must say where each text token stands."""
    rng = np.random.default_rng(seed)
    segments = [random_segment(rng, images, turns, plain) for images, turns in shapes]
    plan = plan_stream(segments, DROPS, 8)
    tokens = [(s, o) for s, segment in enumerate(segments) for o in range(segment.length)]
    visual = {(s, o) for s, seg in enumerate(segments) for span in seg.spans for o in range(span.start, span.end)}
    assert [(st.first_layer, st.end_layer) for st in plan.stages] == [(0, 2), (2, 4), (4, 5), (5, 8)]
    for stage, boundary, drop in zip(plan.stages, plan.boundaries, DROPS, strict=False):
        check_stage(stage, tokens, len(segments))
        assert [tokens[i] for i in boundary.text_rows] == [t for t in tokens if t not in visual]
        assert [tokens[i] for i in boundary.visual_rows] == [t for t in tokens if t in visual]
        queries = iter(boundary.query_rows.tolist())
        for scored in boundary.segments:
            segment_index = tokens[scored.start][0]
            segment = segments[segment_index]
            assert {t[0] for t in tokens[scored.start : scored.end]} == {segment_index}
            for offset in segment.query_offsets:
                row = next(queries)
                remaining = [o for s, o in tokens if s == segment_index and o <= offset]
                assert tokens[row] == (segment_index, max(remaining))
        scores = torch.from_numpy(rng.random(len(boundary.visual_rows), dtype=np.float32))
        chosen = top_k_per_span(scores, boundary.span_of_visual, boundary.take)
        rows = next_rows(boundary, chosen)
        tokens = [tokens[i] for i in rows]
        for index, segment in enumerate(segments):
            for span in segment.spans:
                left = sum(s == index and span.start <= o < span.end for s, o in tokens)
                assert left == drop.kept(span.length, span.length)
    check_stage(plan.stages[-1], tokens, len(segments))
    expected = [(s, o) for s, segment in enumerate(segments) for o in segment.supervised_offsets]
    for row, (segment, offset) in zip(plan.predict_rows.tolist(), expected, strict=True):
        assert tokens[row] == max(t for t in tokens if t[0] == segment and t[1] < offset)


def check_stage(stage, tokens, num_segments):
    lengths = [sum(s == index for s, _ in tokens) for index in range(num_segments)]
    assert list(stage.segment_lengths) == lengths
    assert stage.cu_seqlens.tolist() == np.cumsum([0, *lengths]).tolist()
    assert stage.cu_seqlens.dtype == torch.int32
    assert stage.position_ids.tolist() == [p for n in lengths for p in range(n)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.floats(0.05, 1.0)), min_size=1, max_size=6), st.integers(0, 999))
def test_top_k_per_span(spans, seed):
    rng = np.random.default_rng(seed)
    scores, span_of, take, expected, start = [], [], [], [], 0
    for index, (size, keep) in enumerate(spans):
        own = rng.integers(0, 4, size).astype(np.float32)  # many ties
        kept = int(size * keep)
        best = sorted(range(size), key=lambda i, own=own: (-own[i], i))[:kept]
        expected += sorted(start + i for i in best)
        take += range(start, start + kept)
        scores.append(own)
        span_of += [index] * size
        start += size
    chosen = top_k_per_span(
        torch.from_numpy(np.concatenate(scores)),
        torch.tensor(span_of, dtype=torch.int64),
        torch.tensor(take, dtype=torch.int64),
    )
    assert chosen.tolist() == expected


def test_uniform_choice_spreads_over_the_image():
    segment = SegmentLayout(22, (ImageSpan(1, 20),), query_offsets=(20,), supervised_offsets=(21,))
    plan = plan_stream([segment], (Drop(1, 0.25, uniform_without_text=True),), 2)
    assert plan.boundaries[0].uniform.nonzero().flatten().tolist() == [2, 6, 10, 14, 18]
    worded = SegmentLayout(24, (ImageSpan(1, 20),), query_offsets=(22,), supervised_offsets=(23,))
    assert plan_stream([worded], (Drop(1, 0.25, uniform_without_text=True),), 2).boundaries[0].uniform is None


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (SegmentLayout(10, (ImageSpan(8, 5),), (9,)), "ends after its segment"),
        (SegmentLayout(10, (ImageSpan(1, 5), ImageSpan(4, 3)), (9,)), "overlaps"),
        (SegmentLayout(10, (ImageSpan(1, 5),), ()), "at least one query row"),
        (SegmentLayout(10, (ImageSpan(1, 5),), (3,)), "inside an image"),
        (SegmentLayout(10, (ImageSpan(1, 5),), (12,)), "outside its segment"),
        (SegmentLayout(10, (), (9,), (0,)), "supervised token 0"),
    ],
)
def test_impossible_layouts(segment, message):
    with pytest.raises(ValueError, match=message):
        plan_stream([segment], (), 4)


def test_nothing_left_to_predict_from():
    segment = SegmentLayout(4, (ImageSpan(0, 3),), (2,), (3,))
    with pytest.raises(ValueError, match="no row is left to predict"):
        plan_stream([segment], (Drop(1, 0.2),), 4)
    alone, other = SegmentLayout(3, (ImageSpan(0, 3),), (2,)), SegmentLayout(4, (ImageSpan(1, 3),), (3,))
    for segments in ([alone], [other, alone]):
        with pytest.raises(ValueError, match="no row is left to predict"):
            plan_stream(segments, (Drop(1, 0.2),), 4)
        plan_stream(segments, (Drop(1, 0.5),), 4)


def slow_error(segment, drops):
    """The rule of each row, one offset after the other; ``None`` if all are allowed."""
    tokens = [set(span.offsets().tolist()) for span in segment.spans]
    between = {
        offset
        for span, of_span in zip(segment.spans, tokens, strict=True)
        for offset in range(span.start, span.end)
        if offset not in of_span
    }
    if drops and between.intersection((*segment.query_offsets, *segment.supervised_offsets)):
        return "text between the frames"
    inside = {offset for span in segment.spans for offset in range(span.start, span.end)} - between
    last = {span.end - 1 for span in segment.spans}
    if any(offset >= segment.length for offset in segment.query_offsets):
        return "outside its segment"
    if any(offset in inside - last for offset in segment.query_offsets):
        return "is inside an image"
    if any(not 1 <= offset < segment.length or offset in inside for offset in segment.supervised_offsets):
        return "supervised token"
    return None


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 100_000), st.booleans())
def test_rows_inside_and_between_the_frames_of_videos(seed, drops):
    rng = np.random.default_rng(seed)
    spans, offset = [], int(rng.integers(0, 3))
    for _ in range(rng.integers(1, 4)):
        if rng.random() < 0.5:
            spans.append(ImageSpan(offset, int(rng.integers(0, 4))))
        else:
            runs, start = [], offset
            for _ in range(rng.integers(1, 4)):
                runs.append((start, int(rng.integers(1, 4))))
                start = sum(runs[-1]) + int(rng.integers(0, 3))
            spans.append(ImageSpan(offset, sum(size for _, size in runs), frames=len(runs), runs=tuple(runs)))
        offset = spans[-1].end + int(rng.integers(0, 3))
    rows = rng.integers(0, offset + 4, (2, 2)).tolist()
    segment = SegmentLayout(offset + 3, tuple(spans), tuple(rows[0]), tuple(rows[1]))
    expected = slow_error(segment, drops)
    try:
        plan_stream([segment], (Drop(1, 1.0),) if drops else (), 2)
    except ValueError as error:
        assert (expected or "no row is left to predict") in str(error)
    else:
        assert expected is None


def test_steps_of_a_video_without_grids():
    """Equal parts of its tokens, or its runs."""
    steps = ImageSpan(5, 12, frames=4).steps()
    assert [(step.start, step.length, step.frames) for step in steps] == [(5 + 3 * n, 3, 1) for n in range(4)]
    with pytest.raises(ValueError, match=r"13 tokens cannot be divided into 4 steps in time .* use per: video"):
        ImageSpan(5, 13, frames=4).steps()
    runs = ((5, 6), (13, 7))
    assert [(step.start, step.length) for step in ImageSpan(5, 13, frames=2, runs=runs).steps()] == list(runs)
    assert len(ImageSpan(5, 12, ((2, 3), (2, 3)), frames=3).steps()) == 3, "grids of too few steps are unknown"


def test_a_count_that_needs_spans_is_computed_once_for_equal_spans():
    calls = []

    class Counting(Drop):
        def kept_of(self, span, length, before):
            calls.append((span.grids, span.frames, before))
            return before // (2 if span.frames else 1)

    spans = [ImageSpan(0, 8, ((2, 2),) * 2, 2), ImageSpan(9, 8), ImageSpan(20, 8, ((2, 2),) * 2, 2), ImageSpan(30, 8)]
    kept = counts_per_stage([Counting(1, 0.5)], [8] * 4, spans=spans)[1]
    assert kept.tolist() == [4, 8, 4, 8] and len(calls) == 2
