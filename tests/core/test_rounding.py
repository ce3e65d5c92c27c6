"""Counts from shares: exact, whatever the float's product says; and what each method rounds."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtprune_train import PyramidDrop
from vtprune_train.config.pruning import PruningConfig
from vtprune_train.core.plan import counts_per_stage
from vtprune_train.core.rounding import as_fraction, ceil_of, floor_of, round_of
from vtprune_train.core.stream import Drop, ImageSpan, SegmentLayout
from vtprune_train.data.order import EpochOrder
from vtprune_train.pruning import method_class, method_from_settings
from vtprune_train.pruning.methods.plphp import PLPHP
from vtprune_train.pruning.methods.prumerge import PruMerge
from vtprune_train.pruning.methods.sparsevlm import SparseVLM
from vtprune_train.pruning.methods.victor import Victor
from vtprune_train.pruning.methods.visionzip import VisionZip
from vtprune_train.pruning.ops.recycling import SparseDrop

COUNTS = st.integers(0, 20_000)
DECIMALS = st.integers(1, 6).flatmap(lambda digits: st.integers(0, 10**digits).map(lambda n: f"{n}e-{digits}"))


@given(DECIMALS, COUNTS)
def test_decimals_mean_what_they_say(written, count):
    """0.7 is seven tenths: floor, ceiling and nearest (a half to the even number) of the product of fractions."""
    share, exact = float(written), Fraction(written) * count
    assert as_fraction(share) == Fraction(written)
    assert floor_of(share, count) == math.floor(exact)
    assert ceil_of(share, count) == math.ceil(exact)
    assert round_of(share, count) == round(exact)
    assert floor_of(share, torch.tensor([count, 7])).tolist() == [math.floor(exact), math.floor(Fraction(written) * 7)]


@given(st.integers(0, 3000), st.integers(1, 3000), st.integers(0, 50))
def test_a_published_count_of_so_many_tokens_is_met(kept, tokens, times):
    """Shares such as 64 / 576 have no short decimal."""
    kept = min(kept, tokens)
    assert floor_of(kept / tokens, tokens * times) == kept * times


@given(st.floats(0, 1, exclude_min=True), COUNTS)
def test_any_other_float_is_itself_up_to_its_rounding(share, count):
    low, high = (math.floor((Fraction(share) + side * Fraction(math.ulp(share)) / 2) * count) for side in (-1, 1))
    assert low <= floor_of(share, count) <= high
    assert floor_of(share, torch.tensor(count)) == floor_of(share, count)


def test_a_share_just_below_one():
    """No rounding to twelve digits, on the host or in a tensor."""
    for share in (0.9999999999999999, 1 - 1e-12):
        assert floor_of(share, 1) == floor_of(share, torch.tensor(1)) == 0
    assert floor_of(1.0, torch.tensor(2**31)) == 2**31


@pytest.mark.parametrize("share", [math.nan, math.inf])
def test_what_is_not_a_share(share):
    with pytest.raises(ValueError, match="is not a finite number"):
        as_fraction(share)


def share_of(setting, name):
    """Drops by a method with ``setting`` at each boundary that keeps a share."""
    values = {"keep": setting}
    if name in ("feather", "lvlm_csp"):
        values = {"keep": [setting, setting]}
    elif name == "hidrop":
        values = {"keep": [setting] * 4}
    elif name == "sparsevlm":
        values = {"keep": [setting] * 3, "recycle": "none"}
    elif name == "visionzip":
        values["contextual"] = 0.0
    method = method_from_settings({"method": name, **values})
    return [drop for drop in method.drops(32) if drop.keep not in (0.0, 1.0)]


ONE_SHARE = [
    "fastv", "feather", "prumerge", "fopru", "vtc_cls", "visionzip", "divprune", "cdpruner", "videollm_mod", "hidrop",
    "lvlm_csp", "sparsevlm", "dart", "scope", "hiprune", "vispruner", "idpruner", "random", "uniform", "pool",
]  # fmt: skip


@pytest.mark.parametrize("name", ONE_SHARE)
def test_every_method_that_keeps_a_share_keeps_its_floor(name):
    """All two-digit shares of all sizes that a float's product gets wrong, and some others."""
    wrong = [(n, size) for n in range(1, 100) for size in range(1, 700) if int(n / 100 * size) != n * size // 100]
    assert (70, 90) in wrong and len(wrong) > 30
    for n, size in [*wrong, (50, 577), (1, 100)]:
        drops = share_of(n / 100, name)
        assert drops
        for drop in drops:
            assert drop.kept(size, size) == n * size // 100, (name, n, size, drop)


@given(st.floats(0.01, 1), st.integers(1, 3000))
def test_pyramiddrop_counts_as_its_published_code(keep, tokens):
    """``int(cur_image_token * self.image_token_ratio_list[stage])``."""
    (drop,) = PyramidDrop(layers=(2,), keep=(keep,)).drops(6)
    assert drop.kept(tokens, tokens) == int(tokens * keep)
    assert PyramidDrop(layers=(2,), keep=(0.7,)).drops(6)[0].kept(90, 90) == 62


@given(st.integers(0, 100), st.integers(0, 100), st.lists(st.integers(0, 5000), min_size=1, max_size=5))
def test_plphp_keeps_the_floor_of_each_rate(keep, delta, sizes):
    delta = min(delta, keep, 100 - keep)
    method = PLPHP(keep=keep / 100, delta=delta / 100, alpha=0.5, beta=0.25)
    for gamma, rate in ((0.1, keep - delta), (0.3, keep), (0.7, keep + delta)):
        counts = method.counts(torch.full((len(sizes),), gamma), torch.tensor(sizes))
        assert counts.tolist() == [rate * size // 100 for size in sizes]


def test_the_defaults_of_plphp():
    gamma = torch.tensor([0.0, 0.2, 0.5])
    assert PLPHP().counts(gamma, torch.tensor([90, 90, 90])).tolist() == [9, 36, 63]
    assert PLPHP().counts(gamma, torch.tensor([110, 110, 110])).tolist() == [11, 44, 77]


@given(st.integers(0, 100), st.integers(0, 2000), st.integers(0, 2000))
def test_what_else_methods_count(hundredths, many, few):
    share, exact = hundredths / 100, Fraction(hundredths, 100)
    few = min(many, few)
    rank = SparseVLM(count="rank", scale=share).drops(32)[1]
    if rank.of_present:  # of the tokens in excess so many go
        assert rank.left(many, many) == many - math.floor(exact * many)
    assert VisionZip(keep=0.5, contextual=share).targets(many + 1, many) == math.floor(exact * many)
    best = max(1, few)
    found = PruMerge(spatial=share)._counted(best, many + 1)
    assert found == (min(best, many + 1), min(many + 1 - min(best, many + 1), math.floor(exact * min(best, many + 1))))
    together = PruMerge(keep=0.5, spatial=share)._shared(many)
    assert sum(together) == many and together[0] == min(many, max(1, round(many / (1 + exact))))
    assert SparseDrop(1, 0.5, of_present=share).left(many, many) == many - math.floor((1 - exact) * many)


def test_victor_takes_the_layers_that_the_share_allows():
    assert [Victor().for_budget(n / 32, 32).layers for n in range(1, 32)] == list(range(1, 32))
    assert Victor().for_budget(0.29, 100).layers == 29


@given(st.integers(0, 1000), st.integers(1, 100_000))
def test_warm_ups_are_rounded_up(thousandths, steps):
    ratio = max(1, thousandths) / 1000
    phases = PruningConfig(method="fastv", warmup={"ratio": ratio}).phases(steps, 0)
    assert phases.warmup.steps == math.ceil(Fraction(max(1, thousandths), 1000) * steps)


def test_a_source_gives_its_weight_of_samples():
    assert EpochOrder([90], 0, [0.7]).counts == [63]
    assert EpochOrder([50, 150], 0, [0.15, 0.11]).counts == [8, 16]  # 7.5 and 16.5: to the even number


def test_all_who_count_tokens_agree():
    """The plan's stages, and the arithmetic that budgets, estimates and memory use."""
    for name in (*ONE_SHARE, "pyramiddrop"):
        method = method_class(name)() if name != "prumerge" else PruMerge(keep=0.29)
        lengths = [90, 577, 100, 2880]
        segments = [SegmentLayout(n + 4, (ImageSpan(1, n),), (n + 2,)) for n in lengths]
        plan, counts = method.plan(segments, 32), counts_per_stage(method.drops(32), lengths)
        for stage, kept in zip(plan.stages, counts, strict=True):
            assert [length - 4 for length in stage.segment_lengths] == kept.tolist()
    drop = Drop(1, 0.7)
    assert counts_per_stage([drop], np.array([90, 10]))[1].tolist() == [63, 7]


@pytest.mark.parametrize(
    ("page", "method", "counts"),
    [
        ("hidrop", {"keep": [0.151042, 0.017362, 0.008681, 0.001737]}, [87, 10, 5, 1]),
        ("hidrop", {"keep": [0.786459, 0.017362, 0.008681, 0.001737]}, [453, 10, 5, 1]),
        ("divprune", {"keep": 0.197}, [113]),
        ("divprune", {"keep": 0.196}, [112]),
        ("divprune", {"keep": 0.098}, [56]),
        ("vtc_cls", {"layers": 7, "keep": 0.0625}, [36]),
        ("prumerge", {"keep": 0.25, "spatial": 1}, [144]),
    ],
)
def test_counts_that_a_page_promises(page, method, counts):
    drops = method_from_settings({"method": page, **method}).drops(32)
    assert [drop.kept(576, 576) for drop in drops if 0 < drop.keep < 1] == counts
    text = (Path(__file__).parents[2] / "docs" / "methods" / f"{page}.md").read_text()
    assert str(method["keep"] if page != "hidrop" else method["keep"][0]) in text
