"""DivPrune and CDPruner against slow searches written from the papers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.families import family_inputs, family_model
from vtprune_train import prune
from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.models.forward.padded import kept_tokens
from vtprune_train.pruning.methods.cdpruner import CDPruner, relevance
from vtprune_train.pruning.methods.divprune import DivPrune
from vtprune_train.pruning.ops import diversity
from vtprune_train.pruning.ops.diversity import determinantal, max_min_diverse, nearest_other


def cosine(a, b):
    return float(torch.dot(a, b) / (a.norm() * b.norm()))


def slow_max_min(tokens, take):
    """Every distance looked up anew."""
    chosen = []
    while len(chosen) < take:
        best, best_distance = None, -math.inf
        for i in range(len(tokens)):
            if i in chosen:
                continue
            others = chosen or [j for j in range(len(tokens)) if j != i]
            distance = min((1 - cosine(tokens[i], tokens[j]) for j in others), default=math.inf)
            if distance > best_distance:
                best, best_distance = i, distance
        chosen.append(best)
    return sorted(chosen)


def slow_determinantal(tokens, weights, take):
    """The token whose set has the largest determinant, computed whole each time."""
    n = len(tokens)
    kernel = torch.tensor(
        [[float(weights[i] * weights[j]) * cosine(tokens[i], tokens[j]) for j in range(n)] for i in range(n)],
        dtype=torch.float64,
    ).reshape(n, n)
    chosen = []
    while len(chosen) < take:
        rest = [i for i in range(n) if i not in chosen]
        volumes = [float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]])) for i in rest]
        chosen.append(rest[max(range(len(rest)), key=volumes.__getitem__)])
    return sorted(chosen)


WEIGHTS = torch.linspace(0.1, 1, 60)
IMAGES = st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1)), max_size=4)


def tokens_of(seed, images, channels):
    """Tokens image after image, their numbers, and how many to take: at most one fewer than there are channels, beyond
    which volumes are 0."""
    torch.manual_seed(seed)
    sizes = [n for n, _ in images]
    take = [min(int(n * share), channels - 1) for n, share in images]
    return torch.randn(sum(sizes), channels, dtype=torch.float64), sizes, take


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), IMAGES)
def test_max_min(seed, images):
    tokens, sizes, take = tokens_of(seed, images, 6)
    expected, start = [], 0
    for own, k in zip(tokens.split(sizes), take, strict=True):
        expected += [start + i for i in slow_max_min(own, k)]
        start += len(own)
    assert max_min_diverse(tokens, sizes, take).tolist() == expected


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), IMAGES)
def test_determinantal(seed, images):
    tokens, sizes, take = tokens_of(seed, images, 6)
    weights = torch.rand(len(tokens)) + 0.1
    expected, start = [], 0
    for own, weight, k in zip(tokens.split(sizes), weights.split(sizes), take, strict=True):
        expected += [start + i for i in slow_determinantal(own, weight, k)]
        start += len(own)
    assert determinantal(tokens, weights, sizes, take).tolist() == expected


class _Count(TorchDispatchMode):
    operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("search", [max_min_diverse, lambda tokens, *what: determinantal(tokens, WEIGHTS, *what)])
def test_a_step_starts_no_more_operations_than_the_one_before(search):
    """Each is a kernel on a GPU, and there are as many steps as tokens stay."""
    tokens, counted = torch.randn(len(WEIGHTS), 64), []
    for take in (10, 20, 30):
        with _Count() as count:
            search(tokens, [40, 20], [take, take // 2])
        counted.append(count.operations)
    assert counted[2] - counted[1] == counted[1] - counted[0]


def test_what_adds_no_volume_goes_by_relevance():
    """Three copies of two tokens: one of each first, then the most relevant copies."""
    tokens = torch.tensor([[1.0, 0], [0, 1.0]]).repeat_interleave(3, dim=0)
    weights = torch.tensor([0.9, 0.5, 0.4, 0.3, 0.8, 0.7])
    assert determinantal(tokens, weights, [6], [2]).tolist() == [0, 4]
    assert determinantal(tokens, weights, [6], [4]).tolist() == [0, 1, 4, 5]


def test_what_adds_little_volume_comes_before_what_adds_none():
    """A token that leans by three degrees, before a more relevant copy."""
    tokens = torch.tensor([[1.0, 0], [math.cos(0.05), math.sin(0.05)], [1.0, 0]])
    assert determinantal(tokens, torch.tensor([1.0, 0.5, 0.9]), [3], [2]).tolist() == [0, 1]


def test_an_image_of_several_blocks_of_rows(monkeypatch):
    unit = torch.nn.functional.normalize(torch.randn(11, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    whole = nearest_other(unit)
    monkeypatch.setattr(diversity, "ROWS_AT_A_TIME", 4)
    torch.testing.assert_close(nearest_other(unit), whole)


def test_copies_are_taken_last():
    tokens = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0], [-1.0, 0]])
    assert max_min_diverse(tokens, [4], [3]).tolist() == [0, 2, 3]
    assert max_min_diverse(tokens, [4], [4]).tolist() == [0, 1, 2, 3]


def test_relevance():
    """Two samples, one with two images: each image's tokens are compared with its own sample's instruction."""
    torch.manual_seed(0)
    segments = [
        SegmentLayout(9, (ImageSpan(1, 4),), (8,)),
        SegmentLayout(4, (), (3,)),
        SegmentLayout(12, (ImageSpan(0, 3), ImageSpan(4, 5)), (10,)),
    ]
    boundary = CDPruner(keep=0.5).plan(segments, 2).boundaries[0]
    stream = torch.randn(25, 6)
    hidden, instruction = stream[boundary.visual_rows], stream[boundary.query_rows]
    assert boundary.query_rows.tolist() == [5, 6, 7, 8, 22, 23]
    expected = []
    for rows, text in (([1, 2, 3, 4], [5, 6, 7, 8]), ([13, 14, 15], [22, 23]), ([17, 18, 19, 20, 21], [22, 23])):
        mean = sum(stream[t] / stream[t].norm() for t in text) / len(text)
        cosines = [cosine(stream[r], mean) for r in rows]
        low, high = min(cosines), max(cosines)
        expected += [(c - low + 1e-6) / (high - low + 1e-6) for c in cosines]
    assert relevance(hidden, instruction, boundary).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("method", [DivPrune(keep=0.3), CDPruner(keep=0.3)], ids=lambda method: method.name)
def test_an_image_is_chosen_from_as_if_alone(method):
    texts = [[0, "what is shown here ? assistant :"], ["a red", 1, "and", 2, "two ? assistant :"], ["no picture"]]
    model = prune(family_model("llava_next"), method)
    batched = kept_tokens(model, family_inputs("llava_next", texts))
    for text, row in zip(texts, batched, strict=True):
        alone = kept_tokens(model, family_inputs("llava_next", [text]))[0]
        assert [[k.tolist() for k in image] for image in row] == [[k.tolist() for k in image] for image in alone]


@pytest.mark.parametrize("cls", [DivPrune, CDPruner])
def test_settings_are_checked(cls):
    with pytest.raises(ValueError, match=r"keep=1.5 is not in \(0, 1\]"):
        cls(keep=1.5)
    with pytest.raises(ValueError, match="positions='later' is not one of renumber, keep"):
        cls(positions="later")
    assert cls().for_budget(0.25, 8).input_share(8) == pytest.approx(0.25, abs=1e-3)
