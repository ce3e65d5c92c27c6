"""Plans, against a simulation token by token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.packed import random_segment
from vtprune_train.core.plan import plan_stream
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
