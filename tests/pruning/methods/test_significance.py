"""VTC-CLS, FoPru, PruMerge and VisionZip against loops written from the papers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.families import family_inputs, family_model
from tests.support.packed import random_batch
from vtprune_train import prune
from vtprune_train.core.rounding import floor_of
from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.models.forward.padded import kept_tokens
from vtprune_train.pruning.candidates import Candidates, EncoderSignals
from vtprune_train.pruning.combined import Combined
from vtprune_train.pruning.methods.fopru import FoPru
from vtprune_train.pruning.methods.prumerge import PruMerge, outliers
from vtprune_train.pruning.methods.pyramiddrop import PyramidDrop
from vtprune_train.pruning.methods.visionzip import VisionZip
from vtprune_train.pruning.methods.vtc_cls import VTCCLS

CLASSES = [VTCCLS, FoPru, PruMerge, VisionZip]
# rasters of an image, and the tokens of them that are no patch (the last column of the second raster)
GRIDS = st.one_of(
    st.tuples(st.tuples(st.integers(1, 4), st.integers(1, 5))),
    st.tuples(st.tuples(st.integers(1, 4), st.integers(1, 4)), st.tuples(st.integers(1, 5), st.integers(2, 5))),
)
SEGMENTS = st.lists(st.lists(GRIDS, max_size=2), min_size=1, max_size=3)


def length_of(grids):
    return sum(rows * columns for rows, columns in grids)


def newlines_of(grids):
    """Places of newlines."""
    if len(grids) < 2:
        return []
    start, (rows, columns) = grids[0][0] * grids[0][1], grids[1]
    return [start + (row + 1) * columns - 1 for row in range(rows)]


def layouts(segments):
    made = []
    for images in segments:
        spans, offset = [], 1
        for grids in images:
            spans.append(ImageSpan(offset, length_of(grids), grids))
            offset += length_of(grids) + 1
        made.append(SegmentLayout(offset + 3, tuple(spans), (offset + 1,), (offset + 2,)))
    return made


class Scene:
    """Hand-made signals of a few images at the boundary of a method."""

    def __init__(self, method, segments, seed, layers=1):
        generator = torch.Generator().manual_seed(seed)
        self.images = [grids for images in segments for grids in images]
        self.boundary = method.plan(layouts(segments), 4).boundaries[0]
        sizes = [length_of(grids) for grids in self.images]
        total = sum(sizes)
        attention = torch.rand(layers, total, generator=generator) ** 4 + 0.2  # quartiles well above 0
        keys = torch.randn(total, 6, generator=generator)
        self.hidden = torch.randn(total, 8, generator=generator, dtype=torch.float64)
        tile, first = torch.zeros(total, dtype=torch.int64), 0
        for grids, size in zip(self.images, sizes, strict=True):
            lost = [first + place for place in newlines_of(grids)]
            attention[:, lost], keys[lost], tile[lost] = math.nan, 0.0, -1
            first += size
        features = torch.randn(total, 5, generator=generator).masked_fill((tile < 0)[:, None], 0.0)
        signals = EncoderSignals(attention, keys, tile, features)
        self.candidates = Candidates(self.boundary, self.hidden, self.hidden, self.hidden[:0], encoder=signals)
        self.parts = list(
            zip(attention.split(sizes, dim=1), keys.split(sizes), self.hidden.split(sizes), strict=True)
        )  # fmt: skip

    def of_images(self, selection):
        """[(chosen, contents)] of each image."""
        contents = self.hidden[selection.chosen].clone()
        if selection.at is not None:
            contents[selection.at] = selection.values
        found, first = [], 0
        for own in self.parts:
            mask = (selection.chosen >= first) & (selection.chosen < first + len(own[2]))
            found.append(((selection.chosen[mask] - first).tolist(), contents[mask]))
            first += len(own[2])
        return found


def filled(values):
    """Newlines with the mean of the rest."""
    values = [float(v) for v in values]
    rest = [v for v in values if not math.isnan(v)]
    mean = sum(rest) / len(rest) if rest else 0.0
    return [mean if math.isnan(v) else v for v in values]


def best(values, count):
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def nearest(keys, token, others):
    cosines = [float(torch.cosine_similarity(keys[token], keys[other], dim=0)) for other in others]
    return max(range(len(others)), key=lambda i: (cosines[i], -i))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), SEGMENTS, st.floats(0.05, 1))
def test_vtc_cls(seed, segments, keep):
    method = VTCCLS(keep=keep, layers=3)
    scene = Scene(method, segments, seed, layers=3)
    for (attention, _, hidden), (chosen, contents) in zip(
        scene.parts, scene.of_images(method.choose(scene.candidates)), strict=True
    ):
        sums = filled(attention.sum(dim=0))
        assert chosen == sorted(best(sums, floor_of(keep, len(sums))))
        assert torch.equal(contents, hidden[chosen])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), SEGMENTS, st.floats(0.05, 1), st.sampled_from(["rank", "row"]))
def test_fopru(seed, segments, keep, strategy):
    method = FoPru(keep=keep, strategy=strategy)
    scene = Scene(method, segments, seed)
    selection = scene.of_images(method.choose(scene.candidates))
    for grids, (attention, _, _), (chosen, _) in zip(scene.images, scene.parts, selection, strict=True):
        scores, count = filled(attention[0]), floor_of(keep, length_of(grids))
        if strategy == "rank":
            assert chosen == sorted(best(scores, count))
            continue
        rows, first = [], 0
        for height, width in grids:
            for _ in range(height):
                rows.append(list(range(first, first + width)))
                first += width
        means = [np.float32(sum(scores[i] for i in row) / len(row)) for row in rows]
        order = [i for number in best(means, len(rows)) for i in best_of(scores, rows[number])]
        assert chosen == sorted(order[:count])


def best_of(scores, row):
    return [row[i] for i in best([scores[j] for j in row], len(row))]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), SEGMENTS, st.sampled_from([None, 0.1, 0.4, 1.0]), st.sampled_from([0.0, 0.7, 3.0]))
def test_prumerge(seed, segments, keep, spatial):
    method = PruMerge(keep=keep, spatial=spatial)
    scene = Scene(method, segments, seed)
    selection = method.choose(scene.candidates)
    for number, ((attention, keys, hidden), (chosen, contents)) in enumerate(
        zip(scene.parts, scene.of_images(selection), strict=True)
    ):
        scores = attention[0].numpy()
        patches = scores[~np.isnan(scores)]
        n = len(scores)
        if keep is None:
            q1, q3 = np.percentile(patches, 25), np.percentile(patches, 75)
            count = max(1, int((patches > q3 + 1.5 * (q3 - q1)).sum()))
            extra = min(n - count, int(count * spatial))
            assert int(selection.counts[number]) == count + extra
        else:
            together = max(1, floor_of(keep, n))
            count = min(together, max(1, round(together / (1 + spatial))))
            extra = together - count
        own = [-1.0 if math.isnan(v) else v for v in scores]
        kept = best(own, count)
        rest = [i for i in range(n) if i not in kept]
        kept += [rest[int((i + 0.5) * len(rest) / extra)] for i in range(extra)]
        kept.sort()
        assert chosen == kept
        members = {i: [i] for i in kept}
        centres = [i for i in kept if not math.isnan(scores[i])]
        for token in range(n):
            if token not in kept and not math.isnan(scores[token]):
                members[centres[nearest(keys, token, centres)]].append(token)
        for place, centre in enumerate(kept):
            weights = [0.0 if math.isnan(scores[i]) else float(scores[i]) for i in members[centre]]
            expected = hidden[centre]
            if len(members[centre]) > 1:
                expected = sum(w * hidden[i] for w, i in zip(weights, members[centre], strict=True)) / sum(weights)
            torch.testing.assert_close(contents[place], expected, rtol=1e-5, atol=1e-6)
    if keep == 1.0:
        assert torch.equal(selection.values, scene.hidden), "nothing merged, nothing changed"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60))
def test_outliers(seed, length):
    attention = np.random.default_rng(seed).standard_normal(length).astype(np.float32) ** 3
    first, third = np.percentile(attention, [25, 75])
    assert outliers(torch.from_numpy(attention)) == (attention > third + 1.5 * (third - first)).sum()


def test_equal_attention_has_no_outlier():
    assert outliers(torch.full((9,), 0.125)) == 0
    assert outliers(torch.tensor([0.0, 0.0, 1.0, 1.0, 2.5])) == 0, "on the fence is not above it"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), SEGMENTS, st.floats(0.05, 1), st.sampled_from([0.0, 10 / 64, 0.5, 1.0]))
def test_visionzip(seed, segments, keep, contextual):
    method = VisionZip(keep=keep, contextual=contextual)
    scene = Scene(method, segments, seed)
    selection = scene.of_images(method.choose(scene.candidates))
    for (attention, keys, hidden), (chosen, contents) in zip(scene.parts, selection, strict=True):
        scores = filled(attention[0])
        n = len(scores)
        count = max(1, floor_of(keep, n))
        targets = 0 if count == n else int(count * contextual + 1e-6)
        dominant = sorted(best(scores, count - targets))
        rest = [i for i in range(n) if i not in dominant]
        centres = [rest[int((i + 0.5) * len(rest) / targets)] for i in range(targets)]
        assert chosen == dominant + centres
        members = {i: [i] for i in centres}
        patches = [i for i in centres if not math.isnan(attention[0, i])]
        for token in rest:
            if token not in centres and patches and not math.isnan(attention[0, token]):
                members[patches[nearest(keys, token, patches)]].append(token)
        assert torch.equal(contents[: len(dominant)], hidden[dominant])
        for place, centre in enumerate(centres):
            mean = sum(hidden[i] for i in members[centre]) / len(members[centre])
            torch.testing.assert_close(contents[len(dominant) + place], mean)


def test_published_counts():
    span = [SegmentLayout(580, (ImageSpan(1, 576, ((24, 24),)),), (578,), (579,))]
    for tokens, contextual in ((192, 30), (128, 20), (64, 10)):
        method = VisionZip(keep=tokens / 576)
        (layout,) = method.plan(span, 32).boundaries[0].spans
        assert (layout.after, method.targets(layout.before, layout.after)) == (tokens, contextual)


METHODS = [
    VTCCLS(keep=0.3, layers=2),
    FoPru(keep=0.3),
    FoPru(keep=0.3, strategy="row"),
    PruMerge(),
    PruMerge(spatial=3, positions="keep"),
    PruMerge(keep=0.3, spatial=1),
    VisionZip(keep=0.3, contextual=0.4),
]


@pytest.mark.parametrize("name", ["llava_next", "llava", "llava_onevision"])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_an_image_is_chosen_from_as_if_alone(name, method):
    texts = [[0, "what is shown here ? assistant :"], ["a red", 1, "and", 2, "two ? assistant :"], ["no picture"]]
    model = prune(family_model(name), method)
    batched = kept_tokens(model, family_inputs(name, texts))
    for text, row in zip(texts, batched, strict=True):
        alone = kept_tokens(model, family_inputs(name, [text]))[0]
        assert [[k.tolist() for k in image] for image in row] == [[k.tolist() for k in image] for image in alone]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_everything_kept_is_the_dense_model(cls, positions):
    inputs = family_inputs("llava_next", [[0, "what is shown ?"], ["a red", 1, "and", 2, "two ?"]])
    model = family_model("llava_next")
    with torch.no_grad():
        dense = prune(model, None)(**inputs).logits
        from vtprune_train import unprune

        kept = prune(unprune(model), cls(keep=1.0, positions=positions))(**inputs).logits
    mask = inputs["attention_mask"].bool()
    assert torch.equal(kept[mask], dense[mask])


@pytest.mark.parametrize("method", [PruMerge(spatial=1), VisionZip(keep=0.3, contextual=0.5)], ids=repr)
def test_gradients_reach_merged_tokens(method):
    segment = [[((6, 6),)]]
    scene = Scene(method, segment, 3)
    scene.hidden.requires_grad_(True)
    selection = method.choose(scene.candidates)
    selection.values.sum().backward()
    dominant = set(selection.chosen.tolist()) - set(selection.chosen[selection.at].tolist())
    without = {i for i in range(36) if not scene.hidden.grad[i].any()}
    assert without == dominant


@pytest.mark.parametrize("method", [PruMerge(spatial=3), VisionZip(keep=0.3, contextual=1.0)], ids=repr)
def test_gradients_are_finite_where_newlines_stay(method):
    """A newline weighs nothing, and what comes back may be large."""
    scene = Scene(method, [[((4, 4), (5, 5))]], 1)
    hidden = scene.hidden.float().requires_grad_(True)
    scene.candidates.hidden = hidden
    selection = method.choose(scene.candidates)
    newlines = [place for place, i in enumerate(selection.chosen.tolist()) if i in newlines_of(((4, 4), (5, 5)))]
    assert newlines, "the case is not met"
    (selection.values * 1e4).sum().backward()
    assert hidden.grad.isfinite().all()
    assert torch.equal(selection.values[newlines], hidden[selection.chosen[newlines]])


@pytest.mark.parametrize("method", [*METHODS, PruMerge(keep=0.3)], ids=repr)
@pytest.mark.parametrize("images", [[()], [(), ((3, 3),), ()]], ids=["alone", "beside another"])
def test_an_image_of_which_an_earlier_method_left_nothing(method, images):
    layers = len(method.needs.encoder_layers)
    selection = method.choose(Scene(method, [images], 4, layers).candidates)
    without = method.choose(Scene(method, [[grids for grids in images if grids]], 4, layers).candidates)
    assert torch.equal(selection.chosen, without.chosen)
    if selection.values is not None:
        assert torch.equal(selection.values, without.values)


def test_packed_training_with_a_later_drop():
    """What an adaptive method leaves is what the next method finds."""
    method = Combined((PruMerge(spatial=2), PyramidDrop(layers=(2,), keep=(0.5,))))
    model = prune(family_model("llava_next"), method).train()
    batch = random_batch(model, layouts([[((4, 4),)], [((3, 3),), ((5, 5),)], []]))
    batch.plan = method.plan(layouts([[((4, 4),)], [((3, 3),), ((5, 5),)], []]), 6)
    output = model(batch)
    output.loss_sum.backward()
    first, second = output.plan.boundaries
    assert [span.before for span in second.spans] == [span.after for span in first.spans]
    assert all(0 < span.after <= span.before for span in first.spans)
    assert model.model.multi_modal_projector.linear_1.weight.grad.any()


def test_settings_are_checked():
    for cls in CLASSES:
        with pytest.raises(ValueError, match=r"keep=1.5 is not in \(0, 1\]"):
            cls(keep=1.5)
        with pytest.raises(ValueError, match="positions='later' is not one of renumber, keep"):
            cls(positions="later")
        assert cls().for_budget(0.25, 8).input_share(8) == pytest.approx(0.25, abs=1e-3)
    with pytest.raises(ValueError, match="layers=0 should be greater than 0"):
        VTCCLS(layers=0)
    with pytest.raises(ValueError, match="strategy='best' is not one of rank, row"):
        FoPru(strategy="best")
    with pytest.raises(ValueError, match=r"contextual=1.5 is not in \[0, 1\]"):
        VisionZip(contextual=1.5)
    for spatial in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"spatial={spatial} should be"):
            PruMerge(spatial=spatial)
    assert VTCCLS(layers=3).needs.encoder_layers == (-3, -2, -1)
    assert (FoPru().needs.encoder_rows, VTCCLS().needs.encoder_rows) == ("all", "class")
    assert PruMerge(spatial=3).drops(8)[0].adaptive and not PruMerge(keep=0.2).drops(8)[0].adaptive
    with pytest.raises(ValueError, match="no keep ratios"):
        PruMerge().eased(1.0, 0.5)
