"""The baselines random, uniform and pool, and the rasters that they spread over."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.families import family_inputs, family_model
from tests.support.helpers import tiny_config
from tests.support.passes import check_singly, random_batch_of, text_model_of
from vtprune_train import PruningMethod, prune
from vtprune_train.core.rounding import floor_of
from vtprune_train.core.stream import Drop, ImageSpan, SegmentLayout
from vtprune_train.data.chat import EncodedChat
from vtprune_train.data.load.collate import lay_out
from vtprune_train.models.families.layout import VisualTokens
from vtprune_train.models.families.llava_next import AnyRes
from vtprune_train.models.families.llava_onevision import OneVision
from vtprune_train.models.forward.decoder import run_layers
from vtprune_train.models.forward.padded import kept_tokens
from vtprune_train.pruning.candidates import Candidates, Selection
from vtprune_train.pruning.methods.pool import Pool
from vtprune_train.pruning.methods.random_tokens import Random, draws
from vtprune_train.pruning.methods.uniform import Uniform
from vtprune_train.pruning.ops.grids import blocks, even_cells, image_blocks, shared, spread, strided_cells
from vtprune_train.pruning.ops.selection import all_candidates

RASTERS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3)
BASELINES = [Random, Uniform, Pool]
SIZES = [(40, 70), (90, 30), (50, 50), (30, 31), (28, 200)]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.floats(0, 1))
def test_blocks_are_near_square_rectangles(rows, columns, share):
    count = max(1, int(rows * columns * share))
    of_cell = blocks((rows, columns), count).reshape(rows, columns)
    assert sorted(set(of_cell.ravel().tolist())) == list(range(count))
    heights, widths = [], []
    for block in range(count):
        cells = np.argwhere(of_cell == block)
        height, width = cells.max(axis=0) - cells.min(axis=0) + 1
        assert len(cells) == height * width, "no rectangle"
        heights.append(height)
        widths.append(width)
    assert max(heights) - min(heights) <= 1
    assert of_cell[:, 0].tolist() == sorted(of_cell[:, 0].tolist()), "not in raster order"
    side = (rows * columns / count) ** 0.5
    if min(rows, columns) >= 3 * side:  # enough of them each way for rounding not to matter much
        assert max(heights) <= 2 * side + 1
        assert max(widths) <= 2 * side + 1


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=5), st.floats(0, 1))
def test_shares_are_exact_and_proportional(weights, share):
    count = int(sum(weights) * share)
    dealt = shared(count, weights)
    assert sum(dealt) == count
    for own, weight in zip(dealt, weights, strict=True):
        assert 0 <= own <= weight
        assert abs(own - count * weight / max(sum(weights), 1)) < 1


@settings(max_examples=25, deadline=None)
@given(RASTERS, st.floats(0, 1))
def test_even_cells_are_as_many_as_asked(rasters, share):
    cells = sum(rows * columns for rows, columns in rasters)
    count = int(cells * share)
    found = even_cells(rasters, count).tolist()
    assert len(found) == count
    assert found == sorted(set(found))
    assert all(0 <= cell < cells for cell in found)


def test_places_by_hand():
    assert spread(4, 20).tolist() == [2, 7, 12, 17]
    assert even_cells([(4, 4)], 4).tolist() == [0, 2, 8, 10]
    assert even_cells([(6, 6)], 4).tolist() == [7, 10, 25, 28]
    assert even_cells([(2, 2)], 4).tolist() == [0, 1, 2, 3]
    assert blocks((2, 4), 2).tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert image_blocks([(2, 2), (1, 1)], 1)[0].tolist() == [0, 0, 0, 0, -1]
    assert strided_cells([(4, 4), (1, 5)], 2).tolist() == [0, 2, 8, 10, 16, 20]


def slow_pool(hidden, rasters, count):
    """Means of blocks, cell by cell; the blocks by the words of the docs page."""
    total, means, start = sum(r * c for r, c in rasters), [], 0
    exact = [count * r * c / total for r, c in rasters]
    own = [int(e + 1e-9) for e in exact]
    for i in sorted(range(len(rasters)), key=lambda i: (-round(exact[i] - own[i], 9), i))[: count - sum(own)]:
        own[i] += 1
    for (rows, columns), k in zip(rasters, own, strict=True):
        if k:
            bands = round((k * rows / columns) ** 0.5)
            while bands < 1 or bands * columns < k:
                bands += 1
            bands = min(bands, rows, k)
            for band in range(bands):
                in_band = (band + 1) * k // bands - band * k // bands
                for block in range(in_band):
                    members = [
                        hidden[start + row * columns + column]
                        for row in range(rows)
                        for column in range(columns)
                        if row * bands // rows == band and column * in_band // columns == block
                    ]
                    means.append(sum(members) / len(members))
        start += rows * columns
    return means


def of_images(images, keep, key=7):
    """A segment with images of these rasters, and the plan of a boundary before the decoder."""
    spans, offset = [], 1
    for rasters in images:
        length = sum(rows * columns for rows, columns in rasters)
        spans.append(ImageSpan(offset, length, tuple(rasters)))
        offset += length + 1
    return SegmentLayout(offset + 2, tuple(spans), (offset,), key=key)


def chosen_by(method, segments, hidden=None):
    (boundary,) = method.plan(segments, 6).boundaries
    hidden = torch.zeros(len(boundary.visual_rows), 4) if hidden is None else hidden
    return method.choose(Candidates(boundary, hidden, hidden, hidden[:0])), boundary


@settings(max_examples=20, deadline=None)
@given(st.lists(RASTERS, min_size=1, max_size=3), st.floats(0.05, 1), st.integers(0, 100))
def test_pool_is_the_mean_of_its_blocks(images, keep, seed):
    segment = of_images(images, keep)
    lengths = [span.length for span in segment.spans]
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(sum(lengths), 3, generator=generator, dtype=torch.float64, requires_grad=True)
    selection, _ = chosen_by(Pool(keep=keep), [segment], hidden)
    found = hidden.index_select(0, selection.chosen)
    if selection.at is not None:
        found = found.index_copy(0, selection.at, selection.values)
    expected, start = [], 0
    for rasters, length in zip(images, lengths, strict=True):
        expected += slow_pool(hidden[start : start + length], rasters, floor_of(keep, length))
        start += length
    expected = torch.stack(expected) if expected else hidden[:0]
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    (grad,) = torch.autograd.grad((found * weights).sum(), hidden)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), hidden, allow_unused=True)
    torch.testing.assert_close(grad, torch.zeros_like(hidden) if expected_grad is None else expected_grad)


@pytest.mark.parametrize("method", [Uniform(keep=0.3), Pool(keep=0.3), Random(keep=0.3)])
def test_what_an_earlier_method_left_is_one_row(method):
    """Rasters say nothing of tokens of which some are gone."""
    segment = of_images([[(4, 5)]], 0.3)
    (boundary,) = method.plan([segment], 6).boundaries
    span = replace(boundary.spans[0], original=20, before=18, after=6)
    boundary = replace(boundary, spans=(span,), span_of_visual=torch.zeros(18, dtype=torch.int64))
    hidden = torch.arange(18.0)[:, None]
    chosen = method.choose(Candidates(boundary, hidden, hidden, hidden[:0])).chosen.tolist()
    assert len(set(chosen)) == 6
    if not isinstance(method, Random):
        assert chosen == [1, 4, 7, 10, 13, 16]


def test_draws_look_random_and_depend_on_every_argument():
    found = draws(0, 12345, 0, 4000) / 2.0**64
    counts = np.histogram(found, bins=10, range=(0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-squared, 9 degrees of freedom, 0.1 %
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.05
    for other in ((1, 12345, 0), (0, 12346, 0), (0, 12345, 1)):
        assert not np.intersect1d(draws(0, 12345, 0, 100), draws(*other, 100)).size
    assert draws(0, 12345, 0, 50).tolist() == draws(0, 12345, 0, 100)[:50].tolist()


def test_mixing_is_splitmix64():
    """The reference generator from seed 1234567."""
    from vtprune_train.pruning.methods.random_tokens import GOLDEN, mixed

    state = np.array([1234567], dtype=np.uint64) + GOLDEN * np.arange(1, 4, dtype=np.uint64)
    assert mixed(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_random_depends_on_text_number_and_seed_alone():
    one, other = of_images([[(5, 6)], [(5, 6)]], 0.4, key=1), of_images([[(5, 6)]], 0.4, key=2)
    alone = chosen_by(Random(keep=0.4), [one])[0].chosen.tolist()
    batch = chosen_by(Random(keep=0.4), [other, one])[0].chosen.tolist()
    assert [index - 30 for index in batch[12:]] == alone
    assert [index - 30 for index in alone[12:]] != alone[:12], "both images alike"
    assert batch[:12] != alone[:12]
    assert chosen_by(Random(keep=0.4, seed=1), [one])[0].chosen.tolist() != alone


@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize("layer", [0, 3])
def test_a_batch_is_its_samples(method, layer):
    segments, embeds = random_batch_of(13, [(2, 1), (0, 1), (3, 2)])
    segments = [replace(segment, key=number) for number, segment in enumerate(segments)]
    check_singly(text_model_of(), method(keep=0.4, layer=layer), segments, embeds)
    check_singly(text_model_of(), method(keep=0.4, layer=layer, positions="renumber"), segments, embeds)


@pytest.mark.parametrize("method", BASELINES)
def test_keeping_everything_is_dense(method):
    segments, embeds = random_batch_of(14, [(2, 1), (3, 2)])
    text_model, grads, outputs = text_model_of(), [], []

    class Nothing(PruningMethod):
        name = "nothing"

        def drops(self, num_layers):
            return (Drop(0, 1.0),)

        def choose(self, candidates):
            return Selection(all_candidates(candidates.boundary))

    for own in (method(keep=1.0), Nothing()):
        leaf = embeds.clone().requires_grad_()
        hidden = run_layers(text_model, leaf, own.plan(segments, 6), own).last_hidden_state
        hidden.square().sum().backward()
        grads.append(leaf.grad)
        outputs.append(hidden)
    assert torch.equal(*outputs)
    assert torch.equal(*grads)


@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize("num_layers", [2, 6, 8, 32, 40])
def test_any_depth_and_budget(method, num_layers):
    for share in (0.5, 0.25, 0.1):
        found = method().for_budget(share, num_layers)
        assert found.input_share(num_layers) == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("method", BASELINES)
def test_settings_are_checked(method):
    for wrong, message in (({"keep": 2}, "keep=2"), ({"layer": -1}, "layer=-1"), ({"positions": "x"}, "positions='x'")):
        with pytest.raises(ValueError, match=message):
            method(**wrong)
    with pytest.raises(ValueError, match="layer=6 does not fit a decoder of 6 layers"):
        method(layer=6).drops(6)


def test_rasters_hold_every_token_of_an_image():
    anyres = AnyRes.of(tiny_config())
    one_vision = OneVision(anyres, 2)
    for size in SIZES:
        for layout in (anyres, one_vision):
            for sizes in ([size], [size, size]):
                cells = [sum(rows * columns for rows, columns in own) for own in layout.grids(sizes)]
                assert cells == layout.tokens(sizes)


def test_rasters_reach_the_packed_stream():
    chat = EncodedChat.__new__(EncodedChat)
    object.__setattr__(chat, "input_ids", np.array([1, 4, 5, 4, 6, 7]))
    object.__setattr__(chat, "labels", np.array([-100, -100, -100, -100, -100, 7]))
    object.__setattr__(chat, "image_offsets", (1, 3))
    object.__setattr__(chat, "answer_starts", (5,))
    segment, _ = lay_out(chat, [VisualTokens((4,), grids=((2, 2),)), VisualTokens((6,), grids=((2, 3),))])
    assert [span.grids for span in segment.spans] == [((2, 2),), ((2, 3),)]
    segment, _ = lay_out(chat, [4, 6])
    assert [span.grids for span in segment.spans] == [(), ()]


@pytest.mark.parametrize(
    ("family", "known"),
    [("llava", True), ("llava_next", True), ("llava_onevision", True), ("qwen2_5_vl", True), ("qwen3_vl", True),
     ("internvl", False)],
)  # fmt: skip
def test_rasters_reach_the_padded_rows(family, known):
    seen = []

    class Spy(Uniform):
        def choose(self, candidates):
            seen.extend(candidates.boundary.spans)
            return super().choose(candidates)

    model = prune(family_model(family), Spy())
    kept = kept_tokens(model, family_inputs(family, [[0, "what ?"], ["a", 1, "and", 2, "two ?"]]))
    assert len(seen) == 3
    for span in seen:
        assert bool(span.grids) == known
        if known:
            assert sum(rows * columns for rows, columns in span.grids) == span.before
    flat = [image[0].tolist() for row in kept for image in row]
    rasters = [span.grids or ((1, span.before),) for span in seen]
    assert flat == [even_cells(own, span.after).tolist() for own, span in zip(rasters, seen, strict=True)]
