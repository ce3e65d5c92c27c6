"""VisionSelector, QueCC and text interaction against loops over tokens."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pruning.methods.test_significance import SEGMENTS, Scene, length_of
from tests.support.families import family_inputs, family_model
from vtprune_train import prune
from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.models.forward.padded import kept_tokens
from vtprune_train.pruning.candidates import Candidates
from vtprune_train.pruning.methods.quecc import Compressor, QueCC
from vtprune_train.pruning.methods.text_interaction import TextInteraction, tokens_above_bend
from vtprune_train.pruning.methods.visionselector import HOT, Scorer, VisionSelector
from vtprune_train.pruning.ops.grids import regions
from vtprune_train.pruning.ops.soft_top_k import soft_top_k
from vtprune_train.pruning.phases import Phases, Warmup

HIDDEN = 16


def candidates_of(method, layouts, seed=0, training=False, grids=True):
    """Random candidates in float64 at the method's first drop point, with its own random parameters."""
    generator = torch.Generator().manual_seed(seed)
    boundary = method.plan(layouts, 4).boundaries[0]
    total = sum(span.before for span in boundary.spans)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, instruction = draw(total, HIDDEN).requires_grad_(training), draw(len(boundary.query_rows), HIDDEN)
    module = method.module(HIDDEN, 4).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * draw(*parameter.shape))
    return Candidates(boundary, hidden, hidden, instruction, module=module, training=training)


def segment(*images, text=3, key=0):
    """A sample of images, each a tuple of grids, and ``text`` tokens behind them; the last one asks."""
    spans, offset = [], 1
    for grids in images:
        spans.append(ImageSpan(offset, length_of(grids), grids))
        offset += length_of(grids) + 1
    return SegmentLayout(offset + text, tuple(spans), (offset + text - 1,), key=key)


SAMPLES = [
    segment(((4, 5), (3, 4)), ((2, 2),)),
    segment(text=2),
    segment(((1, 7),), text=5),
    segment(((6, 6),), text=1),
]


# ------------------------------------------------------------------------------------------------------ soft top-k


def slow_soft_top_k(scores, take, temperature):
    """By bisection over one list of numbers."""
    scores = [score / temperature for score in scores]
    if take in (0, len(scores)):
        return [float(take > 0)] * len(scores)
    low, high = -max(scores) - 50, -min(scores) + 50
    for _ in range(200):
        middle = (low + high) / 2
        total = sum(1 / (1 + math.exp(-(score + middle))) for score in scores)
        low, high = (middle, high) if total < take else (low, middle)
    return [1 / (1 + math.exp(-(score + low))) for score in scores]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 9999), st.sampled_from([0.3, 1.0, 4.0]))
def test_probabilities_add_up_to_k(sizes, seed, temperature):
    rng = np.random.default_rng(seed)
    take = [int(rng.integers(0, size + 1)) for size in sizes]
    scores = [rng.normal(0, 3, size) for size in sizes]
    padded, present = (np.zeros((len(sizes), max(sizes)), dtype) for dtype in (np.float64, bool))
    for row, values in enumerate(scores):
        padded[row, : len(values)], present[row, : len(values)] = values, True
    found = soft_top_k(
        torch.from_numpy(padded),
        torch.from_numpy(present),
        torch.tensor(take, dtype=torch.float64)[:, None],
        temperature,
    )
    assert (found[~torch.from_numpy(present)] == 0).all()
    for row, values in enumerate(scores):
        expected = slow_soft_top_k(values.tolist(), take[row], temperature)
        assert found[row, : len(values)].tolist() == pytest.approx(expected, abs=1e-8)
        assert float(found[row].sum()) == pytest.approx(take[row], abs=1e-8)


def test_its_gradient_is_that_of_the_whole_function():
    """By finite differences, through the threshold too; padding gets none."""
    scores = torch.tensor([[0.3, -1.0, 2.0, 0.5], [1.0, 0.0, 0.2, 9.0]], dtype=torch.float64)
    present = torch.tensor([[True] * 4, [True, True, True, False]])
    take, weight = torch.tensor([[2.0], [1.0]], dtype=torch.float64), torch.tensor([[1.0, -2.0, 0.5, 3.0]] * 2)

    def total(values):
        return (soft_top_k(values, present, take, 0.7) * weight).sum()

    variable = scores.clone().requires_grad_()
    total(variable).backward()
    for place in np.ndindex(2, 4):
        step = torch.zeros_like(scores)
        step[place] = 1e-4
        difference = float(total(scores + step) - total(scores - step)) / 2e-4
        assert float(variable.grad[place]) == pytest.approx(difference, abs=1e-6)
    assert variable.grad.sum(dim=1).abs().max() < 1e-9, "a constant added to all scores changes nothing"


@pytest.mark.parametrize("take", [0, 3])
def test_all_or_none_has_no_gradient(take):
    scores = torch.randn(1, 3, requires_grad=True)
    soft_top_k(scores, torch.ones(1, 3, dtype=torch.bool), torch.tensor([[float(take)]])).sum().backward()
    assert not scores.grad.any()


# -------------------------------------------------------------------------------------------------- VisionSelector


def slow_scores(module, hidden):
    """Every query with every key."""
    queries, keys = module.score_query(hidden).detach(), module.score_key(hidden).detach()
    return [float(sum(query @ key for key in keys)) / len(keys) / math.sqrt(len(query)) for query in queries]


def images_of(candidates):
    """[(first candidate, number)] of each image."""
    sizes = [span.before for span in candidates.boundary.spans]
    return list(zip(np.cumsum([0, *sizes[:-1]]).tolist(), sizes, strict=True))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("keep", [0.01, 0.3, 1.0])
def test_the_selector_keeps_the_tokens_of_the_highest_scores(keep, training):
    candidates = candidates_of(VisionSelector(keep=keep, width=6), SAMPLES, training=training)
    selection = VisionSelector(keep=keep, width=6).choose(candidates)
    expected = []
    for first, size in images_of(candidates):
        scores = slow_scores(candidates.module, candidates.hidden[first : first + size])
        best = sorted(range(size), key=lambda i: (-scores[i], i))[: max(1, int(keep * size))]
        expected += sorted(first + place for place in best)
    assert selection.chosen.tolist() == expected
    if training:
        assert torch.equal(selection.values, candidates.hidden[selection.chosen]), (
            "the forward pass drops like inference"
        )
    else:
        assert selection.values is None


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_soft_selector_multiplies_each_token_by_its_probability(temperature):
    method = VisionSelector(keep=0.4, soft=True, temperature=temperature)
    candidates = candidates_of(method, SAMPLES)
    selection = method.choose(candidates)
    assert selection.chosen.tolist() == list(range(len(candidates.hidden)))
    for first, size in images_of(candidates):
        hidden = candidates.hidden[first : first + size]
        chances = slow_soft_top_k(slow_scores(candidates.module, hidden), max(1, int(0.4 * size)), temperature)
        expected = hidden * torch.tensor(chances, dtype=torch.float64)[:, None]
        assert torch.allclose(selection.values[first : first + size], expected, atol=1e-5)
    assert method.input_share(32) == 1.0


def test_training_passes_the_gradient_of_the_probabilities_of_the_kept_tokens():
    """What the soft selector gives the scorer if dropped tokens count nothing; and the tokens get theirs too."""
    gradients = []
    for soft in (False, True):
        method = VisionSelector(keep=0.4, soft=soft)
        candidates = candidates_of(method, SAMPLES, training=True)
        kept = VisionSelector(keep=0.4).choose(candidates_of(VisionSelector(keep=0.4), SAMPLES)).chosen
        values = method.choose(candidates).values
        weight = torch.randn(len(kept), HIDDEN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        ((values[kept] if soft else values) * weight).sum().backward()
        gradients.append([parameter.grad for parameter in candidates.module.parameters()])
        assert candidates.hidden.grad.any()
    for hard, soft in zip(*gradients, strict=True):
        assert hard.any() and torch.allclose(hard, soft, atol=1e-5)


def test_a_warm_up_anneals_the_temperature():
    method = VisionSelector(keep=0.2, temperature=0.5)
    phases = Phases(method, warmup=Warmup(4, "linear", 0.6))
    steps = [phases.of(step).method for step in range(6)]
    assert [step.keep for step in steps] == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.2])
    assert [step.temperature for step in steps] == pytest.approx([0.5 * HOT ** (1 - i / 4) for i in range(5)] + [0.5])
    assert method.eased(0.2, 0.0).keep == 0.2, "the temperature alone"


def test_the_scorer_starts_out_without_a_preference():
    scorer = Scorer(64, 32)
    assert not scorer.score_key.bias.any()
    assert max(p.abs().max() for p in scorer.parameters()) < 1e-3
    assert VisionSelector().module(64, 4).score_query.out_features == 32
    assert VisionSelector(width=5).module(64, 4).score_query.out_features == 5


# ----------------------------------------------------------------------------------------------------------- QueCC


def slow_regions(grid, kernel):
    """[[cells]] of each region; ``None`` outside of the grid."""
    rows, columns = grid
    if rows == 1:
        size = kernel**2
        return [[i if i < columns else None for i in range(first, first + size)] for first in range(0, columns, size)]
    found = []
    for top in range(0, rows, kernel):
        for left in range(0, columns, kernel):
            places = [(top + down, left + right) for down in range(kernel) for right in range(kernel)]
            found.append([r * columns + c if r < rows and c < columns else None for r, c in places])
    return found


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 9)), max_size=3), st.integers(1, 5))
def test_regions(grids, kernel):
    cells, centres = regions(grids, kernel)
    expected, start = [], 0
    for grid in grids:
        for region in slow_regions(grid, kernel):
            expected.append([-1 if cell is None else start + cell for cell in region])
        start += grid[0] * grid[1]
    assert cells.tolist() == expected
    assert sorted(cell for region in expected for cell in region if cell >= 0) == list(range(start)), "each cell once"
    assert all(centre in region for centre, region in zip(centres.tolist(), expected, strict=True))
    spans = [ImageSpan(1, start, tuple(grids))]
    plan = QueCC(kernel=kernel).plan([SegmentLayout(start + 3, tuple(spans), (start + 2,))], 4)
    assert plan.boundaries[0].spans[0].after == len(expected), "as planned"


@pytest.mark.parametrize(("kernel", "row", "column"), [(4, 1, 1), (3, 1, 1), (12, 5, 5)])
def test_the_centre_of_a_region(kernel, row, column):
    assert regions([(12, 12)], kernel)[1][0] == row * 12 + column


def slow_region(module, hidden, text):
    """One region: [M] tokens or None, and its instruction."""
    queries = [None if token is None else module.query_mlp(token + module.instruction(text)) for token in hidden]
    kernel = module.downsample.weight.flatten(1)
    query = module.downsample.bias + sum(q * kernel[:, m] for m, q in enumerate(queries) if q is not None)
    query = module.query_in(query)
    there = [token for token in hidden if token is not None]
    keys = [module.key_in(module.key_mlp(token)) for token in there]
    values = [module.value_in(module.value_mlp(token)) for token in there]
    size, mixed = len(query) // module.heads, []
    for head in range(module.heads):
        part = slice(head * size, (head + 1) * size)
        weights = torch.stack([query[part] @ key[part] / math.sqrt(size) for key in keys]).softmax(dim=0)
        mixed.append(sum(weight * value[part] for weight, value in zip(weights, values, strict=True)))
    return module.out(torch.cat(mixed))


@pytest.mark.parametrize("kernel", [1, 2, 3, 7])
def test_the_compressor(kernel):
    """Several images, tiles and samples; what the instruction is follows the sample."""
    method = QueCC(kernel=kernel, width=8)
    candidates = candidates_of(method, SAMPLES, training=True)
    selection = method.choose(candidates)
    expected, first, texts = [], 0, candidates.instruction.split([4, 6, 2])
    owners = [0, 0, 1, 2]
    for images, owner in zip(
        [SAMPLES[0].spans[0], SAMPLES[0].spans[1], *SAMPLES[2].spans, *SAMPLES[3].spans], owners, strict=True
    ):
        for grid in images.grids:
            for region in slow_regions(grid, kernel):
                tokens = [None if cell is None else candidates.hidden[first + cell] for cell in region]
                expected.append(slow_region(candidates.module, tokens, texts[owner].mean(dim=0)))
            first += grid[0] * grid[1]
    assert torch.allclose(selection.values, torch.stack(expected), atol=1e-6)
    weight = torch.randn(selection.values.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = [candidates.hidden, *candidates.module.parameters()]
    ours = torch.autograd.grad((selection.values * weight).sum(), inputs)
    theirs = torch.autograd.grad((torch.stack(expected) * weight).sum(), inputs)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, atol=1e-5)


def test_without_grids_a_region_is_a_run_of_tokens():
    layout = SegmentLayout(14, (ImageSpan(1, 10),), (13,))
    plan = QueCC(kernel=2).plan([layout], 4)
    assert plan.boundaries[0].spans[0].after == 3
    assert QueCC(kernel=2).choose(candidates_of(QueCC(kernel=2), [layout])).chosen.tolist() == [1, 5, 8]


@pytest.mark.parametrize(("side", "kernel", "number"), [(24, 4, 36), (24, 6, 16), (24, 12, 4), (24, 24, 1)])
def test_the_counts_of_the_paper(side, kernel, number):
    plan = QueCC(kernel=kernel).plan([segment(((side, side),))], 4)
    assert plan.boundaries[0].spans[0].after == number
    assert plan.boundaries[0].drop.kept(side**2, side**2) == number


@pytest.mark.parametrize(
    ("share", "kernel"), [(1.0, 1), (0.5, 2), (0.25, 2), (0.24, 3), (1 / 9, 3), (0.1, 4), (0.001, 32)]
)
def test_a_budget_is_not_exceeded(share, kernel):
    method = QueCC().for_budget(share, 32)
    assert method.kernel == kernel and method.input_share(32) <= share + 1e-4


def test_a_compressor_has_one_kernel():
    made, asked = QueCC(kernel=4), QueCC(kernel=2)
    candidates = dataclasses.replace(candidates_of(asked, SAMPLES), module=made.module(HIDDEN, 4))
    with pytest.raises(ValueError, match="kernel=2 does not fit a compressor made for kernel=4"):
        asked.choose(candidates)


def test_the_module_takes_rows_alone():
    """As on a step that drops nothing, where its parameters need a gradient of zero."""
    for number in (0, 3):
        module = Compressor(HIDDEN, 8, 3, 8)
        module(torch.randn(number, HIDDEN)).sum().backward()
        assert all(parameter.grad is not None for parameter in module.parameters())


# ------------------------------------------------------------------------------------------------ text interaction


def slow_bend(values):
    values = sorted((v for v in values if not math.isnan(v)), reverse=True)
    if not values:
        return 1
    line = [values[0] + (values[-1] - values[0]) * i / max(1, len(values) - 1) for i in range(len(values))]
    gaps = [on_line - value for on_line, value in zip(line, values, strict=True)]
    if max(gaps) <= 1e-9 * values[0]:
        return len(values)
    return max(1, gaps.index(max(gaps)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), SEGMENTS, st.sampled_from([None, 0.1, 0.5]))
def test_the_first_drop(seed, segments, keep):
    method = TextInteraction(keep=keep)
    scene = Scene(method, segments, seed)
    selection = method.choose(scene.candidates)
    for number, ((attention, _, hidden), (chosen, contents)) in enumerate(
        zip(scene.parts, scene.of_images(selection), strict=True)
    ):
        scores = attention[0].double().tolist()
        count = slow_bend(scores) if keep is None else max(1, int(keep * len(scores)))
        own = [-1.0 if math.isnan(score) else score for score in scores]
        assert chosen == sorted(sorted(range(len(own)), key=lambda i: (-own[i], i))[:count])
        assert torch.equal(contents, hidden[chosen])
        if keep is None:
            assert int(selection.counts[number]) == count


@pytest.mark.parametrize(
    ("values", "number"),
    [
        ([], 0),
        ([0.3], 1),
        ([0.2, 0.1], 2),
        ([0.5] * 6, 6),
        ([6.0, 5.0, 4.0, 3.0, 2.0], 5),
        ([9.0, 8.0, 1.0, 0.9, 0.8, 0.7], 2),
        ([0.1, 9.0, 0.1, 0.1], 1),
        ([-1.0, 9.0, 8.0, 1.0, 0.9, 0.8, 0.7, -1.0], 2),
        ([-1.0, -1.0], 1),
        ([0.9, 0.8, 0.7, 0.1], 4),
    ],
)
def test_the_bend(values, number):
    assert int(tokens_above_bend(torch.tensor(values))) == number


def test_the_second_drop_is_a_share_of_what_remains():
    first, second = TextInteraction(layer=3, remaining=0.5).drops(6)
    assert (first.layer, first.adaptive, first.ranked, second.layer, second.adaptive) == (0, True, False, 3, False)
    assert [second.kept(576, before) for before in (0, 1, 7, 200)] == [0, 1, 3, 100]
    assert len(TextInteraction(layer=0).drops(6)) == 1
    assert TextInteraction(keep=0.4).input_share(32) == pytest.approx(0.4 * (2 + 30 * 0.5) / 32, abs=1e-4)
    with pytest.raises(ValueError, match="layer=6 does not fit"):
        TextInteraction(layer=6).drops(6)


def test_the_instruction_selects_between_layers():
    """Another question keeps other tokens, of as many as the image decided."""
    model = prune(family_model("llava_next"), TextInteraction(layer=3, remaining=0.3))
    shown = [
        [tokens.tolist() for tokens in kept_tokens(model, family_inputs("llava_next", [[0, text]]))[0][0]]
        for text in ("what is shown here ? assistant :", "a red dog left ? assistant :")
    ]
    assert shown[0] != shown[1]
    assert [len(tokens) for tokens in shown[0]] == [len(tokens) for tokens in shown[1]]


# ------------------------------------------------------------------------------------------------------------- all


@pytest.mark.parametrize(
    ("cls", "settings_", "said"),
    [
        (VisionSelector, {"keep": 0.0}, "keep=0.0"),
        (VisionSelector, {"temperature": 0.0}, "temperature=0.0"),
        (VisionSelector, {"width": 0}, "width=0"),
        (QueCC, {"kernel": 0}, "kernel=0"),
        (QueCC, {"width": 12}, "width=12 is not divisible by the 8 attention heads; use a multiple of 8"),
        (TextInteraction, {"remaining": 0.0}, "remaining=0.0"),
        (TextInteraction, {"layer": -1}, "layer=-1"),
    ],
)
def test_wrong_settings(cls, settings_, said):
    with pytest.raises(ValueError, match=said):
        cls(**settings_)


@pytest.mark.parametrize("method", [VisionSelector(keep=0.3), VisionSelector(soft=True), QueCC(kernel=2)], ids=repr)
def test_a_batch_chooses_what_its_samples_do(method):
    together = candidates_of(method, SAMPLES)
    selection, done, asked, places = method.choose(together), 0, 0, []
    for sample in SAMPLES:
        boundary = method.plan([sample], 4).boundaries[0]
        number, queries = len(boundary.span_of_visual), len(boundary.query_rows)
        hidden = together.hidden[done : done + number]
        alone = method.choose(
            Candidates(
                boundary, hidden, hidden, together.instruction[asked : asked + queries], module=together.module
            )
        )  # fmt: skip
        places += (alone.chosen + done).tolist()
        if alone.values is not None and len(alone.values):
            start = len(places) - len(alone.chosen)
            assert torch.allclose(selection.values[start : len(places)], alone.values, atol=1e-7)
        done, asked = done + number, asked + queries
    assert selection.chosen.tolist() == places
