"""SparseVLM against a slow one written from the paper: one sample at a time, lists and loops, full attention maps."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.conversations import two_turns
from tests.support.families import family_model
from tests.support.helpers import tiny_model
from tests.support.passes import ExactRotary
from tests.support.reference import attention_rows, queries_and_keys, run_layer
from vtprune_train import prune
from vtprune_train.core.rounding import floor_of
from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.models.forward.decoder import run_layers
from vtprune_train.pruning import method_from_settings
from vtprune_train.pruning.methods.cdpruner import CDPruner
from vtprune_train.pruning.methods.sparsevlm import SparseVLM
from vtprune_train.pruning.ops.raters import LEAST_RESPONSE, numerical_rank, text_raters
from vtprune_train.pruning.ops.recycling import SparseDrop, density_peaks, merge_clusters, recycled
from vtprune_train.pruning.ops.scoring import tokens_holding
from vtprune_train.pruning.schedules.budget import layer_counts

PLUS = {"recycle": "none", "positions": "keep", "heads": 14 / 32, "gravity": True}
VARIANTS = {
    "fixed": {"keep": (0.3, 0.1)},  # few enough that long images make several clusters
    "paper_sum": {"keep": (0.2, 0.1), "recycle": "sum", "positions": "keep"},
    "plus": {"keep": (0.5, 0.25), **PLUS},
    "rank": {"count": "rank", "scale": 0.7},
    "rank_plus": {"count": "rank", "scale": 0.4, **PLUS},
    "mass": {"count": "mass", "mass": 0.3},
}


def sample(rng, num_images, num_turns, plain=False):
    """Images spread over the turns, a question and an answer each; ``plain`` has no question."""
    images = sorted(rng.integers(0, num_turns, num_images).tolist())
    spans, queries, offset = [], [], 1
    for turn in range(num_turns):
        for _ in range(images.count(turn)):
            spans.append(ImageSpan(offset, int(rng.integers(6, 90))))
            offset = spans[-1].end
        offset += 0 if plain else int(rng.integers(2, 7))
        queries.append(offset - 1)
        offset += int(rng.integers(1, 4))
    return SegmentLayout(offset, tuple(spans), tuple(queries))


def slow_raters(visual, text):
    """The text tokens i with r_i > mean(r), r_i = mean over j of softmax over i of v_j . t_i."""
    r, visual, text = [0.0] * len(text), visual.detach().numpy(), text.detach().numpy()
    for v in visual:
        products = [v @ t for t in text]
        weights = [math.exp(p - max(products)) for p in products]
        r = [old + w / sum(weights) / len(visual) for old, w in zip(r, weights, strict=True)]
    found = [i for i, value in enumerate(r) if value > sum(r) / len(r) * (1 + 1e-6)]
    return found or list(range(len(text)))


def slow_clusters(tokens, num):
    """Centres in order, and the members of each."""
    n, tokens = len(tokens), tokens.numpy()
    d = [[math.sqrt(((a - b) ** 2).sum()) / math.sqrt(len(a)) for b in tokens] for a in tokens]
    rho = [math.exp(-sum(x * x for x in sorted(d[i])[:num]) / num) for i in range(n)]
    largest = max(max(row) for row in d)
    delta = []
    for i in range(n):
        denser = [d[i][j] for j in range(n) if rho[j] > rho[i] or (rho[j] == rho[i] and j < i)]
        delta.append(min(denser, default=largest))
    centres = sorted(range(n), key=lambda i: (-rho[i] * delta[i], i))[:num]
    members = [[centre] for centre in centres]
    for i in set(range(n)) - set(centres):
        nearest = min(range(num), key=lambda c: d[centres[c]][i])
        members[nearest].append(i)
    return centres, members


def slow_instruction(segment):
    """Offsets of the text behind the last image, up to the first row behind it that predicts an answer."""
    end = segment.spans[-1].end
    answers = [offset for offset in segment.query_offsets if offset >= end]
    return list(range(end, answers[0] + 1)) if answers else [segment.query_offsets[-1]]


def slow_left(method, step, original, shares):
    """How many of one image's tokens stay; ``shares`` [raters, tokens]."""
    now = shares.shape[1]
    if method.count == "fixed":
        return min(floor_of(method.keep[step], original), now)
    if method.count == "rank":
        return now - math.floor(method.scale * (now - int(torch.linalg.matrix_rank(shares.float()))) + 1e-9)
    p = sorted(shares.mean(dim=0).tolist(), reverse=True)
    return next(k for k in range(1, now + 1) if sum(p[:k]) >= method.mass * sum(p) - 1e-12)


def slow_shares(method, text_model, layer, x, position, rows, seen, theta):
    """[raters, v]: mean over (the chosen) heads of causal attention, corrected or not."""
    attention = attention_rows(*queries_and_keys(layer, x, position, theta))[:, rows][:, :, seen]
    if method.gravity:
        half = layer.self_attn.head_dim // 2
        place = position.tolist()
        for a, row in enumerate(rows):
            for b, column in enumerate(seen):
                distance = place[row] - place[column]
                response = sum(math.cos(distance * theta ** (-m / half)) for m in range(half)) / half
                attention[:, a, b] /= max(response, LEAST_RESPONSE)
    heads = range(len(attention))
    if method.heads < 1:
        mass = attention.sum(dim=(1, 2)).tolist()
        heads = sorted(heads, key=lambda h: (-mass[h], h))[: max(1, round(method.heads * len(mass)))]
    return torch.stack([attention[h] for h in heads]).mean(dim=0)


def slow_sparsevlm(method, text_model, embeds, segment):
    """Hidden states behind the last layer, and each image's tokens behind every sparse layer."""
    theta = text_model.config.rope_parameters["rope_theta"]
    start = list(range(segment.length))  # of each token: its offset, or that of its image
    image = [None] * segment.length
    for number, span in enumerate(segment.spans):
        start[span.start : span.end] = [span.start] * span.length
        image[span.start : span.end] = [number] * span.length
    x, position, counts = embeds, torch.arange(segment.length), []
    if segment.spans:
        instruction = slow_instruction(segment)
        visual = [i for i, number in enumerate(image) if number is not None]
        raters = [instruction[i] for i in slow_raters(embeds[visual], embeds[instruction])]
    for index, layer in enumerate(text_model.layers):
        before, x = x, run_layer(layer, x, position, theta)
        if index not in method.layers or not segment.spans:
            continue
        with torch.no_grad():
            rows = [sum(s <= offset for s in start) - 1 for offset in raters]
            seen = [i for i, number in enumerate(image) if number is not None]
            shares = slow_shares(method, text_model, layer, before, position, rows, seen, theta)
        rebuilt = []  # (start, image, position, state)
        for i, number in enumerate(image):
            if number is None:
                rebuilt.append((start[i], None, position[i], x[i]))
            elif number not in image[:i]:
                rebuilt += slow_image(method, index, segment, number, image, seen, shares, position, x)
        start, image = [entry[0] for entry in rebuilt], [entry[1] for entry in rebuilt]
        x = torch.stack([entry[3] for entry in rebuilt])
        position = torch.stack([entry[2] for entry in rebuilt])
        if method.positions == "renumber":
            position = torch.arange(len(rebuilt))
        counts.append([image.count(number) for number in range(len(segment.spans))])
    return x, counts


def slow_image(method, index, segment, number, image, seen, shares, position, x):
    """What becomes of one image's tokens."""
    span = segment.spans[number]
    own = [i for i, which in enumerate(image) if which == number]
    shares = shares[:, [seen.index(i) for i in own]]
    left = slow_left(method, method.layers.index(index), span.length, shares)
    p = shares.mean(dim=0).tolist()
    order = sorted(range(len(own)), key=lambda i: (-p[i], i))
    tokens = [(span.start, number, position[own[i]], x[own[i]]) for i in sorted(order[:left])]
    deleted = len(own) - left
    if deleted and method.recycle != "none":
        pool = [own[i] for i in sorted(order[left : left + int(0.3 * deleted) + 1])]
        centres, members = slow_clusters(x[pool].detach(), int(len(pool) / 10) + 1)
        for centre, group in zip(centres, members, strict=True):
            total = torch.stack([x[pool[i]] for i in group]).sum(dim=0)
            merged = total / len(group) if method.recycle == "mean" else total
            tokens.append((span.start, number, position[pool[centre]], merged))
    return tokens


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=8, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.booleans()), min_size=1, max_size=3),
    st.sampled_from([2, 4, 1]),
)
def test_equals_the_slow_reference(variant, seed, shapes, kv_heads):
    """Several images, several turns, no image, no instruction, grouped queries, batches; with gradients."""
    rng = np.random.default_rng(seed)
    method = SparseVLM(layers=(1, 3), **VARIANTS[variant])
    model = tiny_model(seed, kv_heads=kv_heads).double().eval()
    prune(model, method)
    text_model = model.model.language_model
    text_model.rotary_emb = ExactRotary(text_model.config)
    segments = [sample(rng, *shape) for shape in shapes]
    embeds = torch.randn(sum(s.length for s in segments), 32, dtype=torch.float64, requires_grad=True)
    fast = run_layers(text_model, embeds, method.plan(segments, 6), method)
    weights = torch.randn(32, dtype=torch.float64)
    fast_gradient = torch.autograd.grad((fast.last_hidden_state * weights).sum(), embeds)[0]
    slow, counts, start = [], [], 0
    for segment in segments:
        x, own = slow_sparsevlm(method, text_model, embeds[start : start + segment.length], segment)
        slow.append(x)
        counts.append(own)
        start += segment.length
    for step, boundary in enumerate(fast.plan.boundaries[1:]):
        assert [span.after for span in boundary.spans] == [n for own in counts if own for n in own[step]]
    slow = torch.cat(slow)
    slow_gradient = torch.autograd.grad((slow * weights).sum(), embeds)[0]
    # Norms of the layers are float32, and one may round otherwise.
    torch.testing.assert_close(fast.last_hidden_state, slow, rtol=0, atol=1e-6)
    scale = slow_gradient.abs().max()
    torch.testing.assert_close(fast_gradient / scale, slow_gradient / scale, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", [SparseVLM(), CDPruner()], ids=lambda method: method.name)
def test_a_last_image_without_text_behind_it_is_asked_by_its_last_token(method):
    """Images that captions follow at once: the row of an earlier caption would not see the last image at all."""
    segment = SegmentLayout(20, (ImageSpan(1, 6), ImageSpan(10, 6)), (6, 15), (7, 8, 16, 17))
    assert method.plan([segment], 6).boundaries[0].query_rows.tolist() == [15]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 45), st.integers(1, 40), st.data())
def test_clusters(seed, num_tokens, num_different, data):
    """With equal tokens among them, so that ties have to be broken."""
    num_clusters = data.draw(st.integers(1, num_tokens))
    rng = np.random.default_rng(seed)
    different = torch.from_numpy(rng.standard_normal((num_different, 5)))
    tokens = different[torch.from_numpy(rng.integers(0, num_different, num_tokens))]
    centres, cluster = density_peaks(tokens, num_clusters)
    slow_centres, members = slow_clusters(tokens, num_clusters)
    assert centres.tolist() == slow_centres
    assert [sorted(np.flatnonzero(cluster == c).tolist()) for c in range(num_clusters)] == [sorted(m) for m in members]
    for average in (True, False):
        expected = [tokens[m].mean(dim=0) if average else tokens[m].sum(dim=0) for m in members]
        torch.testing.assert_close(merge_clusters(tokens, cluster, num_clusters, average), torch.stack(expected))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 12))
def test_raters(seed, num_visual, num_text):
    torch.manual_seed(seed)
    visual, text = torch.randn(num_visual, 8), torch.randn(num_text, 8)
    assert torch.nonzero(text_raters(visual, text)).flatten().tolist() == slow_raters(visual, text)


def test_where_no_text_stands_out_all_of_it_rates():
    assert text_raters(torch.randn(4, 8), torch.ones(3, 8)).all()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=20), st.sampled_from([0.25, 0.5, 0.75, 1.0]))
def test_tokens_that_hold_a_share(scores, share):
    ordered = sorted(scores, reverse=True)
    needed = next(k for k in range(1, len(scores) + 1) if sum(ordered[:k]) >= share * sum(scores))
    assert tokens_holding(torch.tensor(scores, dtype=torch.float32), share) == needed


@pytest.mark.parametrize(
    ("budget", "published", "processed"), [(192, 192.0, 206.5), (128, 128.6, 145.4), (64, 64.8, 82.3)]
)
def test_published_budgets(budget, published, processed):
    """LLaVA-1.5-7B: 32 layers, 576 tokens. The published number counts what leaves a layer."""
    drops = SparseVLM(budget=budget).drops(32)
    entering, leaving = layer_counts(drops, 32, 576)
    assert sum(leaving) / 32 == pytest.approx(published, abs=0.0501)
    assert sum(entering) / 32 == pytest.approx(processed, abs=0.0501)
    assert [drop.layer for drop in drops] == [0, 3, 7, 16]


@pytest.mark.parametrize("budget", [192, 128, 96, 64])
@pytest.mark.parametrize("recycle", ["mean", "none"])
def test_budgets_without_recycling_leave_as_many(budget, recycle):
    _, leaving = layer_counts(SparseVLM(budget=budget, recycle=recycle).drops(32), 32, 576)
    assert sum(leaving) / 32 == pytest.approx(budget, abs=1)


def test_published_counts_are_exact():
    """Through the shares of 576, which no float may round down."""
    counts = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}
    for budget, kept in counts.items():
        drops = SparseVLM(budget=budget).drops(32)[1:]
        assert tuple(drop.left(576, 576) for drop in drops) == kept
        assert tuple(drop.left(5 * 576, 5 * 576) for drop in drops) == tuple(5 * n for n in kept)
    for deleted in range(1, 4000):
        assert recycled(deleted) == (n := int(0.3 * deleted) + 1, int(n / 10) + 1)


def test_counts_of_any_length():
    """A share that a float rounds down (0.29 of 100) costs no token; of those present the deleted are rounded down."""
    assert SparseDrop(1, 0.29, recycles=False).kept(100, 100) == 29
    assert SparseDrop(1, 0.29).left(100, 20) == 20
    assert [SparseDrop(1, 0.5, of_present=0.5).left(100, before) for before in (5, 6)] == [3, 3]
    assert [drop.keep for drop in SparseVLM(count="rank", scale=0.5).drops(32)] == [1, 0.5, 0.25, 0.125]


def test_the_rank_is_pytorch_s():
    """Roundings of float32 count by the longer side: 1e-6 is one of 40 columns, not of 2 rows."""
    for matrix in (torch.zeros(2, 40), torch.eye(2, 40), torch.eye(2, 40) * torch.tensor([[1.0], [1e-6]])):
        assert numerical_rank(matrix) == torch.linalg.matrix_rank(matrix)


def test_a_warm_up_starts_where_it_is_told():
    assert SparseVLM(count="rank", scale=0.5).eased(0.8, 0.0).scale == pytest.approx(0.2)
    assert SparseVLM(count="rank", scale=0.5).eased(0.8, 1.0).scale == pytest.approx(0.5)
    assert SparseVLM(count="mass", mass=0.4).eased(0.8, 0.5).mass == pytest.approx(0.6)


@pytest.mark.parametrize("num_layers", [2, 6, 8, 32, 40])
@pytest.mark.parametrize("count", ["fixed", "rank", "mass"])
def test_any_depth_and_budget(num_layers, count):
    method = SparseVLM(count=count)
    layers = [drop.layer for drop in method.drops(num_layers)]
    assert layers == sorted(set(layers))
    assert 1 <= layers[1] <= layers[-1] < num_layers
    if num_layers > 2:
        for share in (0.5, 0.25):
            found = method.for_budget(share, num_layers)
            assert found.input_share(num_layers) == pytest.approx(share, abs=1e-3)
            assert method_from_settings(found.settings()) == found
    halfway = method.eased(1.0, 0.5).drops(num_layers)
    assert all(1 > drop.keep > own.keep for drop, own in zip(halfway[1:], method.drops(num_layers)[1:], strict=True))
    assert all(drop.keep == 1 for drop in method.eased(1.0, 0.0).drops(num_layers))


def test_layers_of_version_1():
    drops = SparseVLM(keep=(0.6, 0.4, 0.2, 0.1)).drops(32)
    assert [drop.layer for drop in drops] == [0, 3, 7, 16, 20]


@pytest.mark.parametrize(
    "more", [{"keep": (1.0, 1.0)}, {"count": "rank", "scale": 0.0}, {"count": "mass", "mass": 1.0}]
)
def test_keep_everything_equals_dense(more):
    method = SparseVLM(layers=(1, 3), **more)
    model = tiny_model().eval()
    text_model = prune(model, method).model.language_model
    segments = [sample(np.random.default_rng(i), i, 2) for i in range(3)]
    embeds = torch.randn(sum(s.length for s in segments), 32)
    dense = method.plan([SegmentLayout(s.length) for s in segments], 6)
    everything = run_layers(text_model, embeds, method.plan(segments, 6), method)
    assert torch.equal(run_layers(text_model, embeds, dense, method).last_hidden_state, everything.last_hidden_state)


@pytest.mark.parametrize("variant", ["fixed", "rank_plus"])
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_a_second_turn_with_a_new_image(family, variant):
    """On one cache, whose keys stand between: batched with padding as row by row."""
    model = prune(family_model(family), SparseVLM(layers=(1, 3), **VARIANTS[variant]))
    firsts = [["user", 0, "what is shown ? assistant :"], ["is the dog red ?"]]
    seconds = [["and", 1, "left ? assistant :"], ["and here", 2, "no ?"]]
    batched, lengths = two_turns(model, family, firsts, seconds)
    for row, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        assert torch.equal(two_turns(model, family, [first], [second])[0][0], batched[row])
    assert lengths[-1] < lengths[0]


class _Forbid(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in func.name() for name in ("_local_scalar_dense", "nonzero", "masked_select", "unique"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["fixed", "plus"])
def test_fixed_counts_never_wait_for_the_device(variant):
    method = SparseVLM(layers=(1, 3), **VARIANTS[variant])
    text_model = prune(tiny_model().eval(), method).model.language_model
    segments = [sample(np.random.default_rng(i), i, 2) for i in range(3)]
    embeds = torch.randn(sum(s.length for s in segments), 32)
    plan = method.plan(segments, 6)
    with _Forbid():
        run_layers(text_model, embeds, plan, method)


def test_half_precision_stays_what_it_is():
    method = SparseVLM(layers=(1, 3), **VARIANTS["fixed"])
    text_model = prune(tiny_model().bfloat16().eval(), method).model.language_model
    segments = [sample(np.random.default_rng(1), 2, 1)]
    embeds = torch.randn(segments[0].length, 32, dtype=torch.bfloat16)
    assert run_layers(text_model, embeds, method.plan(segments, 6), method).last_hidden_state.dtype == torch.bfloat16


def test_flops_of_the_selector():
    plan = SparseVLM().plan([SegmentLayout(600, (ImageSpan(5, 576),), (599,))], 32)
    method, (raters, first, *_) = SparseVLM(), plan.boundaries
    assert method.selector_flops(4096, raters) == 2 * 19 * 576 * 4096  # text behind the image: 581 .. 599
    assert method.selector_flops(4096, first) == 3 * 83 * 83 * 4096 + 2 * 83 * 9 * 4096
    assert replace(method, recycle="none").selector_flops(4096, replace_drop(method, plan)) == 0


def replace_drop(method, plan):
    other = replace(method, recycle="none").drops(32)[1]
    return replace(plan.boundaries[1], drop=other)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"count": "some"}, "count='some' is not one of fixed, rank, mass"),
        ({"budget": 100}, "budget=100 is not one of 192, 128, 96, 64"),
        ({"budget": 64, "keep": (0.5, 0.2, 0.1)}, "set one of them"),
        ({"budget": 64, "count": "rank"}, "budget=64 has no effect with count=rank"),
        ({"scale": 0.3}, "scale=0.3 has no effect with count=fixed; use count=rank"),
        ({"mass": 0.8, "count": "rank"}, "mass=0.8 has no effect with count=rank; use count=mass"),
        ({"keep": (0.5, 0.2)}, "set layers too"),
        ({"keep": (0.2, 0.5, 0.1)}, "increases"),
        ({"layers": (3, 2, 5)}, "must be increasing"),
        ({"layers": (3, 5)}, "has 2 entries but keep has 3"),
        ({"scale": 1.5}, "scale=1.5 is not in"),
        ({"mass": 0.0}, "mass=0.0 is not in"),
        ({"heads": 0.0}, "heads=0.0 is not in"),
        ({"recycle": "max"}, "recycle='max' is not one of mean, sum, none"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        SparseVLM(**wrong)


def test_a_layer_that_does_not_exist():
    with pytest.raises(ValueError, match="layer 5 would see fewer tokens, because the decoder has 6 layers"):
        SparseVLM(layers=(1, 2, 5)).drops(6)
