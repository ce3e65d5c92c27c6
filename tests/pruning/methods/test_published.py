"""``variant: published`` of PruMerge and VisionZip, against loops over tokens; recorded cases are in test_golden."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pruning.methods.test_significance import SEGMENTS, Scene, best, layouts, length_of, newlines_of
from tests.support.families import family_inputs, family_model
from tests.support.family_runs import RECORDS, TEXT_ONLY, Setup, padded_inputs
from vtprune_train import prune
from vtprune_train.core.rounding import floor_of
from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.models.io.build import set_trainable
from vtprune_train.pruning import method_from_settings, saved_settings
from vtprune_train.pruning.combined import Combined
from vtprune_train.pruning.methods.prumerge import PruMerge
from vtprune_train.pruning.methods.uniform import Uniform
from vtprune_train.pruning.methods.visionzip import VisionZip

PUBLISHED = {"variant": "published"}
ALL_PARTS = {"projector": 1.0, "language_model": 1.0, "pruning": 1.0, "vision_tower": 1.0}


def split(scene, tensor):
    return tensor.split([length_of(grids) for grids in scene.images])


def similar(keys, one, other):
    return float(torch.cosine_similarity(keys[one], keys[other], dim=0))


def weights_of(attention):
    return [0.0 if math.isnan(value) else float(value) for value in attention]


def slow_prumerge(method, attention, keys, features, project, hidden):
    """The places and contents of one image's tokens."""
    n = len(attention)
    if n < 2:
        return list(range(n)), hidden
    order = best([-1.0 if math.isnan(value) else float(value) for value in attention], n)
    if method.keep is None:
        patches = attention.numpy()[~np.isnan(attention.numpy())]
        q1, q3 = np.percentile(patches, 25), np.percentile(patches, 75)
        kept = order[: min(n - 1, max(1, int((patches > q3 + 1.5 * (q3 - q1)).sum())))]
        if method.spatial:
            step = int(int(1 / (len(kept) / n)) / method.spatial)
            grid = [token for token in range(0, n - 1, max(1, step)) if token not in kept]
            kept = kept + grid[: n - 1 - len(kept)]
    else:
        total = min(n, max(2, floor_of(method.keep, n) + 1)) - 1
        count = min(total, max(1, round(total / (1 + method.spatial))))
        step = n // max(1, total - count)
        kept = order[:count] + [step // 2 + step * place for place in range(total - count)]
    twice = len(kept) - len(set(kept))
    others = [token for token in range(n) if token not in kept][twice:]
    rows, weights = kept + others, weights_of(attention)
    contents = []
    for place, token in enumerate(kept):
        if math.isnan(attention[token]):
            contents.append(hidden[token])
            continue
        near = [other for other in range(len(rows)) if other != place and not math.isnan(attention[rows[other]])]
        near = sorted(near, key=lambda other, token=token: -similar(keys, token, rows[other]))[:32]
        added = sum((weights[rows[other]] * features[rows[other]] for other in near), torch.zeros(5).double())
        contents.append(project(features[token] + added))
    rest = sum((weights[token] * features[token] for token in others), torch.zeros(5).double())
    return [*kept, n - 1], torch.stack([*contents, project(rest)])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), SEGMENTS, st.sampled_from([None, 0.1, 0.4, 1.0]), st.sampled_from([0.0, 1.0, 3.0]))
def test_prumerge(seed, segments, keep, spatial):
    method = PruMerge(keep=keep, spatial=spatial, **PUBLISHED)
    scene = Scene(method, segments, seed)
    selection = method.choose(scene.candidates)
    images = zip(scene.parts, scene.of_images(selection), split(scene, scene.features), strict=True)
    for number, ((attention, keys, hidden), (chosen, contents), features) in enumerate(images):
        expected, values = slow_prumerge(method, attention[0], keys, features, scene.project, hidden)
        assert chosen == expected
        torch.testing.assert_close(contents, values, rtol=1e-5, atol=1e-6)
        if keep is None:
            assert int(selection.counts[number]) == len(expected)
        else:
            assert scene.boundary.spans[number].after == len(expected)


def test_prumerge_counts():
    """72 with the most attention, 72 on a grid and the sum of the rest, of a tile of CLIP-L."""
    method = PruMerge(keep=0.25, spatial=1, **PUBLISHED)
    span = [SegmentLayout(580, (ImageSpan(1, 576, ((24, 24),)),), (578,), (579,))]
    (layout,) = method.plan(span, 32).boundaries[0].spans
    assert layout.after == 145 and method._shared(144) == (72, 72)


def slow_visionzip(method, attention, keys, features, classes, tiles, project, hidden):
    """``tiles``: the tokens of each tile, in order."""
    found = []
    for tokens in tiles:
        count = max(1, floor_of(method.keep, len(tokens)))
        targets = 0 if count == len(tokens) else int(count * method.contextual + 1e-6)
        has_class = count < len(tokens) and count - targets > 1
        scores = [float(attention[token]) for token in tokens]
        dominant = sorted(tokens[place] for place in best(scores, count - targets - has_class))
        rest = [token for token in tokens if token not in dominant]
        centres = [rest[place * (len(rest) // targets)] for place in range(targets)]
        means = keys.unflatten(1, (2, -1)).mean(dim=1)
        joins = {centre: [] for centre in centres}
        for token in rest:
            if token not in centres and centres:
                joins[max(centres, key=lambda centre, token=token: similar(means, token, centre))].append(token)
        merged = [features[c] + (sum(features[j] for j in js) / len(js) if js else 0) for c, js in joins.items()]
        class_token = [(tokens[0], project(classes[tokens[0]]))] if has_class else []
        contextual = list(zip(centres, map(project, merged), strict=True))
        found.append((class_token, [(token, hidden[token]) for token in dominant], contextual))
    if not found:
        return []
    dominant = sorted((entry for tile in found[1:] for entry in tile[1]), key=lambda entry: entry[0])
    classes, contextual = ([entry for tile in found[1:] for entry in tile[kind]] for kind in (0, 2))
    return [*(entry for part in found[0] for entry in part), *dominant, *classes, *contextual]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), SEGMENTS, st.floats(0.05, 1), st.sampled_from([0.0, 10 / 64, 0.5, 1.0]))
def test_visionzip(seed, segments, keep, contextual):
    method = VisionZip(keep=keep, contextual=contextual, **PUBLISHED)
    scene = Scene(method, segments, seed)
    images = zip(
        scene.images,
        scene.parts,
        scene.of_images(method.choose(scene.candidates)),
        split(scene, scene.features),
        split(scene, scene.classes),
        strict=True,
    )
    for number, (grids, (attention, keys, hidden), (chosen, contents), features, classes) in enumerate(images):
        newlines, tiles, first = newlines_of(grids), [], 0
        for rows, columns in grids:
            tiles.append([token for token in range(first, first + rows * columns) if token not in newlines])
            first += rows * columns
        tiles = [tokens for tokens in tiles if tokens]
        expected = slow_visionzip(method, attention[0], keys, features, classes, tiles, scene.project, hidden)
        assert chosen == [token for token, _ in expected]
        assert len(chosen) == scene.boundary.spans[number].after
        if expected:
            torch.testing.assert_close(contents, torch.stack([value for _, value in expected]), rtol=1e-5, atol=1e-6)


def test_visionzip_counts():
    """The class token is one of the dominant tokens, and every tile keeps as many."""
    tiles = (576, 576, 576, 288)
    span = [SegmentLayout(2100, (ImageSpan(1, 2060, tile_tokens=tiles),), (2090,), (2091,))]
    for tokens, contextual in ((192, 30), (128, 20), (64, 10)):
        method = VisionZip(keep=tokens / 576, **PUBLISHED)
        boundary = method.plan(span, 32).boundaries[0]
        assert boundary.spans[0].after == 3 * tokens + tokens // 2
        assert method.targets(576, tokens) == contextual


METHODS = [
    PruMerge(**PUBLISHED),
    PruMerge(spatial=3, **PUBLISHED),
    PruMerge(keep=0.3, spatial=1, **PUBLISHED),
    VisionZip(keep=0.4, contextual=0.4, **PUBLISHED),
]
FAMILIES = ["llava_next", "llava", "llava_onevision"]


class Noted:
    """What a method chose in each pass."""

    def __init__(self, monkeypatch, method):
        self.selections = []
        real = type(method).choose

        def choose(method, candidates):
            self.selections.append(real(method, candidates))
            return self.selections[-1]

        monkeypatch.setattr(type(method), "choose", choose)


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_rows_choose_what_padded_rows_do(name, method, tmp_path, monkeypatch):
    """The tiles of the collator's plan are those of the family's own code, and a batch without images passes."""
    setup = Setup(name, tmp_path)
    parts = setup.parts()
    noted = Noted(monkeypatch, method)
    model = prune(parts.model, method).eval()
    collate = setup.collator(parts, method)
    with torch.no_grad():
        model(collate(range(len(RECORDS))))
        model(**padded_inputs(setup, model))
        model(collate([TEXT_ONLY]))
    packed, padded, text_only = noted.selections
    assert torch.equal(packed.chosen, padded.chosen) and len(packed.chosen) > 4
    torch.testing.assert_close(packed.values, padded.values)
    assert len(text_only.chosen) == len(text_only.values) == 0


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_gradients_reach_projector_and_tower(method, tmp_path):
    """Also without images, where a rank must have gradients too."""
    setup = Setup("llava_next", tmp_path)
    parts = setup.parts()
    model = prune(parts.model, method).train()
    set_trainable(model, ALL_PARTS)
    collate = setup.collator(parts, method)
    model(collate(range(len(RECORDS)))).loss_sum.backward()
    read = [f"vision_tower.encoder.layers.{layer}." for layer in (0, 1)]
    for key, parameter in model.named_parameters():
        if "multi_modal_projector" in key or any(part in key for part in read):
            assert parameter.grad is not None and parameter.grad.isfinite().all()
            assert parameter.grad.any() or key.endswith("k_proj.bias"), key
    model.zero_grad()
    model(collate([TEXT_ONLY])).loss_sum.backward()
    assert all(p.grad is not None for key, p in model.named_parameters() if "multi_modal_projector" in key)


@pytest.mark.parametrize("method", METHODS[2:], ids=repr)
def test_a_recomputed_tower_has_the_same_gradients(method):
    gradients = []
    for recomputes in (False, True):
        model = family_model("llava_next")
        if recomputes:
            model.model.vision_tower.gradient_checkpointing_enable({"use_reentrant": False})
        prune(model, method).train()
        inputs = family_inputs("llava_next", [[0, "what is shown ?"], ["a red", 1, "and", 2, "two ?"]])
        labels = inputs["input_ids"].clone()
        labels[:, :-2] = -100
        model(**inputs, labels=labels).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient)


def test_merged_values_are_projected_sums():
    """The projector is not linear: what is merged before it differs from what is merged after it."""
    scene = Scene(METHODS[1], [[((6, 6),)]], 3)
    scene.features.requires_grad_(True)
    selection = METHODS[1].choose(scene.candidates)
    selection.values.sum().backward()
    assert scene.features.grad.any(dim=1).all(), "every patch is in some sum"
    assert (selection.values.abs() <= 1).all()


def test_after_another_method():
    """Tiles are not known once tokens are missing; an image then counts as one tile."""
    model = prune(family_model("llava_next"), Combined((Uniform(keep=0.5), VisionZip(keep=0.5, **PUBLISHED))))
    inputs = family_inputs("llava_next", [[0, "what is shown ?"], ["a red", 1, "and", 2, "two ?"], ["no"]])
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


def test_checkpoints_saved_before_have_the_default_variant():
    for settings_before in (
        {"method": "prumerge", "keep": None, "spatial": 0.0, "layer": -1, "positions": "renumber"},
        {"method": "visionzip", "keep": 0.25, "contextual": 0.15625, "layer": -1, "positions": "renumber"},
    ):
        config = type("Config", (), {"pruning": settings_before})()
        method = method_from_settings(saved_settings(config))
        assert method.variant == "default" and method.needs.encoder_layers == (-1,)
        assert not method.needs.encoder_features


def test_settings():
    assert PruMerge(**PUBLISHED).needs.encoder_layers == ("last",)
    assert PruMerge(layer=3, **PUBLISHED).needs.encoder_layers == (3,)
    assert PruMerge().needs.encoder_layers == (-1,) and PruMerge().needs.encoder_heads == "each"
    with pytest.raises(ValueError, match="layer=-2 with variant=published: use -1, the tower's last layer"):
        PruMerge(layer=-2, **PUBLISHED)
    for cls in (PruMerge, VisionZip):
        with pytest.raises(ValueError, match="variant='paper' is not one of default, published"):
            cls(variant="paper")
        published = cls(keep=0.25, **PUBLISHED)
        assert method_from_settings(published.settings()) == published
        assert published.for_budget(0.2, 8).input_share(8) == pytest.approx(0.2, abs=1e-3)
        boundary = published.plan(layouts([[((4, 4),)]]), 8).boundaries[0]
        assert published.selector_flops(32, boundary) > cls(keep=0.25).selector_flops(32, boundary)
