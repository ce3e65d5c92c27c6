"""DART, SCOPE, HiPrune, VisPruner and IDPruner against loops written from the papers and their published code."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pruning.methods.test_diversity import cosine
from tests.pruning.methods.test_significance import SEGMENTS, Scene, best, filled, layouts, length_of, newlines_of
from tests.support.families import family_inputs, family_model
from vtprune_train import prune, unprune
from vtprune_train.core.rounding import floor_of
from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.models.forward.encoder import layers_read
from vtprune_train.models.forward.padded import kept_tokens
from vtprune_train.pruning.candidates import Candidates, Ranking
from vtprune_train.pruning.methods.dart import DART
from vtprune_train.pruning.methods.hiprune import HiPrune
from vtprune_train.pruning.methods.idpruner import IDPruner
from vtprune_train.pruning.methods.scope import SCOPE
from vtprune_train.pruning.methods.vispruner import VisPruner

IN_FRONT = [SCOPE, HiPrune, VisPruner, IDPruner]
EACH = pytest.mark.parametrize("cls", [DART, *IN_FRONT])
SEEDS, SHARES = st.integers(0, 10_000), st.floats(0.05, 1)


def similar(a, b):
    return 0.0 if not a.any() or not b.any() else cosine(a, b)


def choices(method, scene):
    """For each image: its grids, attention, features, hidden states and the tokens chosen."""
    chosen = [tokens for tokens, _ in scene.of_images(method.choose(scene.candidates))]
    sizes = [length_of(grids) for grids in scene.images]
    features = scene.candidates.encoder.features.split(sizes)
    parts = [(attention, hidden) for attention, _, hidden in scene.parts]
    return [(grids, *part, own, tokens) for grids, part, own, tokens in zip(
        scene.images, parts, features, chosen, strict=True)]  # fmt: skip


def slow_covering(features, weights, count):
    picked = []
    while len(picked) < count:
        gains = {}
        for j in set(range(len(features))) - set(picked):
            gain = 0.0
            for i in range(len(features)):
                covered = max([0.0, *(similar(features[i], features[p]) for p in picked)])
                gain += max(0.0, similar(features[i], features[j]) - covered)
            gains[j] = gain * weights[j]
        picked.append(max(gains, key=gains.get))
    return sorted(picked)


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.lists(st.lists(st.just(((3, 3), (2, 3))), max_size=2), min_size=1, max_size=2), st.floats(0.05, 0.5))
def test_scope(seed, segments, keep):
    method = SCOPE(keep=keep, alpha=0.7)
    for grids, attention, _, features, chosen in choices(method, Scene(method, segments, seed)):
        weights = [value**0.7 for value in filled(attention[0])]
        assert chosen == slow_covering(features.double(), weights, floor_of(keep, length_of(grids)))


def slow_vispruner(attention, features, newlines, count, share):
    order = sorted(range(len(attention)), key=lambda i: (-attention[i], i))
    if count == len(order):
        return order
    important = floor_of(share, count)
    chosen, rest = order[:important], order[important:]
    while len(rest) > count - important > 0:
        first, second = rest[0::2], rest[1::2]
        likeness = {i: 2.0 if i in newlines else max(similar(features[i], features[j]) for j in second) for i in first}
        first.sort(key=lambda i: -likeness[i])
        rest = first[min(8, len(rest) - (count - important)) :] + second
    return sorted(chosen + rest[: count - important])


@settings(max_examples=25, deadline=None)
@given(SEEDS, SEGMENTS, SHARES, st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_vispruner(seed, segments, keep, important):
    method = VisPruner(keep=keep, important=important)
    for grids, attention, _, features, chosen in choices(method, Scene(method, segments, seed)):
        count = floor_of(keep, length_of(grids))
        newlines = newlines_of(grids)
        assert chosen == sorted(
            slow_vispruner(filled(attention[0]), features.double(), newlines, count, important)
        )  # fmt: skip


def slow_hiprune(grids, objects, deep, newlines, count, alpha):
    anchors = sorted(range(len(objects)), key=lambda i: (-objects[i], i))[: round(count * alpha / 5)]
    buffers, start = set(), 0
    for rows, columns in grids:
        end = start + rows * columns
        for i in set(anchors) & set(range(start, end)):
            steps = [1, columns] if rows > 1 else [1]
            buffers |= {min(max(i + sign * step, start), end - 1) for step in steps for sign in (-1, 1)}
        start = end
    buffers -= {*anchors, *newlines}
    order = [sorted(part, key=lambda i: (-deep[i], i)) for part in (anchors, buffers)]
    rest = [i for i in best(deep, len(deep)) if i not in anchors and i not in buffers]
    rest.sort(key=lambda i: (-deep[i], i))
    return sorted([*order[0], *order[1], *rest][:count])


@settings(max_examples=40, deadline=None)
@given(SEEDS, SEGMENTS, SHARES, st.sampled_from([0.0, 0.3, 0.7]))
def test_hiprune(seed, segments, keep, alpha):
    method = HiPrune(keep=keep, alpha=alpha)
    scene = Scene(method, segments, seed, layers=2)
    scene.candidates.encoder.attention.mul_(0.5)  # means over queries and heads are below 1
    for grids, attention, _, _, chosen in choices(method, scene):
        count, newlines = floor_of(keep, length_of(grids)), newlines_of(grids)
        objects, deep = (filled(part) for part in attention)
        # neighbors beyond the count compare by attention plus 1, with fewer digits
        expected = slow_hiprune(grids, objects, [float(torch.tensor(d)) for d in deep], newlines, count, alpha)
        assert chosen == expected


def slow_relevance(features, importance, count, balance):
    picked = []
    while len(picked) < count:
        left = [i for i in range(len(features)) if i not in picked]
        value = {
            i: balance * importance[i] - (1 - balance) * max(similar(features[i], features[p]) for p in picked)
            if picked
            else importance[i]
            for i in left
        }
        picked.append(max(left, key=value.get))
    return sorted(picked)


@settings(max_examples=25, deadline=None)
@given(SEEDS, SEGMENTS, SHARES, st.sampled_from([0.0, 0.4, 1.0]))
def test_idpruner(seed, segments, keep, balance):
    method = IDPruner(keep=keep, balance=balance)
    for grids, attention, hidden, _, chosen in choices(method, Scene(method, segments, seed)):
        raw = filled(attention[0])
        low, high = min(raw), max(raw)
        importance = [(value - low) / (high - low + 1e-6) for value in raw]
        assert chosen == slow_relevance(hidden, importance, floor_of(keep, length_of(grids)), balance)


def test_several_tokens_per_step():
    """The first step takes the most important tokens, however similar; later ones no fewer than asked for."""
    scene = Scene(IDPruner(keep=0.5), [[((4, 5),)]], 3)
    attention = scene.candidates.encoder.attention[0]
    assert scene.of_images(IDPruner(keep=0.5, at_once=10).choose(scene.candidates))[0][0] == sorted(best(attention, 10))
    one, four = (scene.of_images(IDPruner(keep=0.5, at_once=n).choose(scene.candidates))[0][0] for n in (1, 4))
    assert set(best(attention, 4)) <= set(four) and len(four) == len(one)


class DecoderScene:
    """Hidden states and keys of random samples at the drop point of DART."""

    def __init__(self, method, segments, seed):
        generator = torch.Generator().manual_seed(seed)
        self.boundary = method.plan(layouts(segments), 6).boundaries[0]
        rows = len(self.boundary.text_rows) + len(self.boundary.visual_rows)
        self.hidden = torch.randn(rows, 8, generator=generator, dtype=torch.float64)
        self.keys = torch.randn(rows, 2, 3, generator=generator)
        queries = torch.randn(len(self.boundary.query_rows), 4, 3, generator=generator)
        self.candidates = Candidates(
            self.boundary,
            self.hidden[self.boundary.visual_rows],
            self.hidden[self.boundary.visual_rows],
            self.hidden[self.boundary.query_rows],
            ranking=Ranking(queries, self.keys, 1.0),
        )


def slow_dart(hidden, keys, visual, text, count, image_pivots, text_pivots):
    norms = keys.abs().sum(dim=(1, 2))
    own = sorted(visual, key=lambda i: (-norms[i], i))[: min(image_pivots, count)]
    asking = sorted(text, key=lambda i: (-norms[i], i))[:text_pivots]
    chosen, share = list(own), math.ceil((count - len(own)) / max(1, len(own) + len(asking)))
    for pivot in [*own, *asking]:
        left = [i for i in visual if i not in chosen]
        left.sort(key=lambda i: cosine(hidden[i], hidden[pivot]))
        chosen += left[: min(share, count - len(chosen))]
    return sorted(chosen)


@settings(max_examples=40, deadline=None)
@given(SEEDS, SEGMENTS, SHARES, st.integers(1, 5), st.integers(0, 5))
def test_dart(seed, segments, keep, image_pivots, text_pivots):
    method = DART(layer=2, keep=keep, image_pivots=image_pivots, text_pivots=text_pivots)
    scene = DecoderScene(method, segments, seed)
    expected, start = [], 0
    for sample in layouts(segments):
        text = range(start + sample.spans[-1].end, start + sample.query_offsets[0] + 1) if sample.spans else ()
        for span in sample.spans:
            visual = range(start + span.start, start + span.end)
            count = floor_of(keep, span.length)
            expected += slow_dart(scene.hidden, scene.keys, visual, text, count, image_pivots, text_pivots)
        start += sample.length
    chosen = method.choose(scene.candidates).chosen
    assert scene.boundary.visual_rows[chosen].tolist() == expected


def test_dart_without_text_after_the_image():
    """The row that predicts the answer is the image's last token, which is then the only text pivot."""
    method = DART(layer=1, keep=0.5)
    boundary = method.plan([SegmentLayout(12, (ImageSpan(1, 9),), (9,), (10,))], 4).boundaries[0]
    assert boundary.query_rows.tolist() == [9]
    hidden = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    ranking = Ranking(torch.zeros(1, 2, 4), torch.randn(12, 2, 4, generator=torch.Generator().manual_seed(1)), 1.0)
    visual = hidden[boundary.visual_rows]
    chosen = method.choose(Candidates(boundary, visual, visual, hidden[boundary.query_rows], ranking)).chosen
    assert len(chosen) == 4 and torch.equal(chosen, chosen.sort().values)


def test_the_published_middle_layer():
    """Layer 8 of CLIP-L, whose layer 22 of 24 feeds the projector, and its share of other depths."""
    (objects, last) = HiPrune().needs.encoder_layers
    config = family_model("llava").config
    for depth, expected in ((24, [8, 22]), (2, [0, 0]), (13, [4, 11])):
        config.vision_config.num_hidden_layers = depth
        assert layers_read(config, (objects, last)) == expected
    config.vision_config.num_hidden_layers = 24
    assert layers_read(config, HiPrune(object_layer=-3).needs.encoder_layers) == [20, 22]
    with pytest.raises(ValueError, match="has no layer 24: it has 24"):
        layers_read(config, HiPrune(object_layer=24).needs.encoder_layers)


def test_neighbors_are_the_towers_next_patches():
    """An anchor in the middle of a grid, one in a corner, and one beside a newline."""
    method = HiPrune(keep=0.5, alpha=1.0)
    scene = Scene(method, [[((3, 3), (4, 4))]], 0, layers=2)
    attention = scene.candidates.encoder.attention
    attention[0, 9 + 5], attention[1] = 9.0, torch.where(attention[1].isnan(), attention[1], 0.1)
    ((chosen, _),) = scene.of_images(method.choose(scene.candidates))
    assert {9 + 5, 9 + 4, 9 + 6, 9 + 1, 9 + 9} <= set(chosen)
    attention[0, 9 + 5], attention[0, 9 + 6] = 0.0, 9.0  # 9 + 7 is a newline
    method = HiPrune(keep=6 / 25, alpha=1.0)  # one anchor
    scene.candidates.boundary = method.plan(layouts([[((3, 3), (4, 4))]]), 4).boundaries[0]
    ((chosen, _),) = scene.of_images(method.choose(scene.candidates))
    assert {9 + 6, 9 + 5, 9 + 2, 9 + 10} <= set(chosen) and 9 + 7 not in chosen


MODELS = [DART(keep=0.3), SCOPE(keep=0.3), HiPrune(keep=0.4, alpha=0.6), VisPruner(keep=0.3), IDPruner(keep=0.3)]


@pytest.mark.parametrize("name", ["llava_next", "llava", "llava_onevision"])
@pytest.mark.parametrize("method", MODELS, ids=lambda method: method.name)
def test_an_image_is_chosen_from_as_if_alone(name, method):
    texts = [[0, "what is shown here ? assistant :"], ["a red", 1, "and", 2, "two ? assistant :"], ["no picture"]]
    model = prune(family_model(name), method)
    batched = kept_tokens(model, family_inputs(name, texts))
    for text, row in zip(texts, batched, strict=True):
        alone = kept_tokens(model, family_inputs(name, [text]))[0]
        assert [[k.tolist() for k in image] for image in row] == [[k.tolist() for k in image] for image in alone]


@EACH
@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_everything_kept_is_the_dense_model(cls, positions):
    inputs = family_inputs("llava_next", [[0, "what is shown ?"], ["a red", 1, "and", 2, "two ?"]])
    model = family_model("llava_next")
    with torch.no_grad():
        dense = prune(model, None)(**inputs).logits
        kept = prune(unprune(model), cls(keep=1.0, positions=positions))(**inputs).logits
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(kept[mask], dense[mask])


@pytest.mark.parametrize("cls", IN_FRONT)
@pytest.mark.parametrize("images", [[()], [(), ((3, 3),), ()]], ids=["alone", "beside another"])
def test_an_image_of_which_an_earlier_method_left_nothing(cls, images):
    method = cls(keep=0.3)
    selection = method.choose(Scene(method, [images], 4, 2).candidates)
    without = method.choose(Scene(method, [[grids for grids in images if grids]], 4, 2).candidates)
    assert torch.equal(selection.chosen, without.chosen)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])
def test_dart_needs_no_tower(name):
    inputs = family_inputs(name, [[0, "what is shown ?"], ["a red", 1, "and", 2, "two ?"]])
    kept = kept_tokens(prune(family_model(name), DART(keep=0.5)), inputs)
    assert [len(row) for row in kept] == [1, 2] and all(len(image[-1]) for row in kept for image in row)


@EACH
def test_settings_are_checked(cls):
    with pytest.raises(ValueError, match=r"keep=1.5 is not in \(0, 1\]"):
        cls(keep=1.5)
    with pytest.raises(ValueError, match="positions='later' is not one of renumber, keep"):
        cls(positions="later")
    assert cls().for_budget(0.25, 8).input_share(8) == pytest.approx(0.25, abs=1e-3)


def test_other_settings_are_checked():
    with pytest.raises(ValueError, match="image_pivots=0 should be greater than 0"):
        DART(image_pivots=0)
    with pytest.raises(ValueError, match="layer=9 does not fit a decoder of 8 layers"):
        DART(layer=9).drops(8)
    with pytest.raises(ValueError, match=r"balance=1.5 is not in \[0, 1\]"):
        IDPruner(balance=1.5)
    with pytest.raises(ValueError, match=r"important=-0.1 is not in \[0, 1\]"):
        VisPruner(important=-0.1)
    with pytest.raises(ValueError, match=r"alpha=2.0 is not in \[0, 1\]"):
        HiPrune(alpha=2.0)
    with pytest.raises(ValueError, match=r"alpha=-1\.0 should be"):
        SCOPE(alpha=-1.0)
