"""What is counted: tokens that enter and leave the layers, FLOPs of every kind of selector, what the cache holds."""

import re
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.families import family_inputs, family_model, tokenizer
from tests.support.helpers import tiny_config
from tests.support.runner import Runs
from vtprune_train import PyramidDrop, prune
from vtprune_train.bench.costs import ImageTokens, Sample, Subject, estimate
from vtprune_train.cli import main
from vtprune_train.core.flops import (
    DecoderGeometry,
    PassCost,
    TrainingCost,
    VisualTokens,
    kept_keys,
    selector_flops,
    stage_lengths,
    visual_per_stage,
)
from vtprune_train.core.plan import replan
from vtprune_train.core.stream import Drop, ImageSpan, SegmentLayout
from vtprune_train.data.load.collate import Collator
from vtprune_train.evaluation.answering import Loaded
from vtprune_train.evaluation.timing import measured_answers
from vtprune_train.pruning import METHODS, method_class
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.combined import Combined

LLAVA = "llava-hf/llava-1.5-7b-hf"


@dataclass(frozen=True)
class Plus(Drop):
    """Two tokens more than there are, at most 12."""

    def kept(self, length, before):
        return min(before + 2, 12)


class Given(PruningMethod):
    """Drops as given, without a ranking; ``work`` FLOPs a boundary."""

    given: tuple[Drop, ...] = ()
    work: float = 0.0
    name = "given"

    def drops(self, num_layers):
        return self.given

    def selector_flops(self, hidden, boundary):
        return self.work


@pytest.mark.parametrize(("budget", "leave", "enter"), [(192, 192.0, 206.5), (128, 128.6, 145.4), (64, 64.8, 82.3)])
def test_published_budgets_of_sparsevlm(budget, leave, enter, capsys):
    options = ["--model", LLAVA, "--visual_tokens", "576", "--method", "sparsevlm", "--set", f"budget={budget}"]
    assert main(["estimate", *options]) == 0
    out = capsys.readouterr().out
    printed = {key: float(re.search(rf"{key} a layer +([\d.]+)", out)[1]) for key in ("enter", "leave")}
    assert printed == {"enter": enter, "leave": leave}


@settings(max_examples=25)
@given(
    spans=st.lists(st.lists(st.integers(0, 60), max_size=3), min_size=1, max_size=4),
    text=st.integers(1, 9),
    drops=st.lists(st.tuples(st.sampled_from([0.0, 0.3, 1.0, "plus", "back"]), st.integers(0, 5)), max_size=4),
)
def test_stage_lengths_of_any_drop(spans, text, drops):
    """One span at a time: floors, tokens added, tokens that come back."""
    drops = sorted(drops, key=lambda pair: pair[1])
    made = [
        Plus(layer, 1.0, adds=True) if kind == "plus" else Drop(layer, 1.0, returns=True) if kind == "back"
        else Drop(layer, kind)
        for kind, layer in drops
    ]  # fmt: skip

    def stages(length):
        counts = [length]
        for kind, _ in drops:
            now = counts[-1]
            counts.append(
                length if kind == "back" else min(now + 2, 12) if kind == "plus" else min(now, int(length * kind))
            )
        return counts

    own = np.array([n for sample in spans for n in sample], dtype=np.int64)
    owner = np.repeat(np.arange(len(spans)), [len(sample) for sample in spans])
    lengths = stage_lengths(np.full(len(spans), text), own, owner, made)
    expected = [[text + sum(stages(n)[i] for n in sample) for i in range(len(drops) + 1)] for sample in spans]
    assert lengths.tolist() == expected


@settings(max_examples=25)
@given(stages=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 3)), min_size=1, max_size=5))
def test_means_over_layers(stages):
    """Layer by layer: what a layer leaves is what the next one gets; the last leaves what it got."""
    entering = [count for count, layers in stages for _ in range(layers)]
    if not entering:
        return
    share = [1 / (1 + layer) for layer in range(len(entering))]
    visual = VisualTokens.of([count for count, _ in stages], [layers for _, layers in stages], share)
    leaving = [entering[min(layer + 1, len(entering) - 1)] for layer in range(len(entering))]
    assert visual.entering == pytest.approx(sum(entering) / len(entering))
    assert visual.leaving == pytest.approx(sum(leaving) / len(entering))
    assert visual.cached == pytest.approx(sum(n * s for n, s in zip(entering, share, strict=True)) / len(entering))


def segments():
    return [
        SegmentLayout(30, (ImageSpan(1, 10), ImageSpan(12, 8)), (25,), (26, 27)),
        SegmentLayout(12, (ImageSpan(2, 6),), (9,), (10,)),
        SegmentLayout(5, (), (2,), (3,)),
    ]


def test_only_what_is_computed_is_counted():
    geometry = DecoderGeometry.of(tiny_config().text_config)
    drops = (Drop(0, 0.5), Drop(3, 0.2))
    assert selector_flops(geometry, Given(drops).plan(segments(), 6), Given(drops)) == 0, "no ranking, nothing else"
    own = Given(drops, work=1000.0)
    assert selector_flops(geometry, own.plan(segments(), 6), own) == 2000
    ranked = PyramidDrop(layers=(2,), keep=(0.5,))
    keys, rows, pairs = 47 * 2 * 32 * 16, 2 * 2 * 32 * 32, (30 + 12) * 2 * 32
    assert selector_flops(geometry, ranked.plan(segments(), 6), ranked) == keys + rows + pairs
    free = PyramidDrop(layers=(2,), keep=(0.5,), rank_with="this_layer")
    assert selector_flops(geometry, free.plan(segments(), 6), free) == pairs
    both = Combined((own, PyramidDrop(layers=(4,), keep=(0.5,), rank_with="this_layer")))
    fifth = [2 + 1 + 12, 1 + 6]  # of each segment, once the first method has left a fifth
    assert selector_flops(geometry, both.plan(segments(), 6), both) == 2000 + sum(fifth) * 2 * 32


def test_text_that_voco_hides_is_not_in_the_cache():
    geometry = DecoderGeometry.of(tiny_config().text_config)
    cost, supervised = TrainingCost(geometry, None, True, False), np.array([2, 1, 1])
    values = []
    for hide in ("image", "all_before"):
        method = method_class("voco")(hide=hide)
        values.append(PassCost.of(cost, method.plan(segments(), 6), method, supervised).cache_values)
    one_token = 6 * 2 * 16
    assert values[0] == pytest.approx((12 + 6 + 5 + 3 * 2) * one_token)
    assert values[0] - values[1] == pytest.approx((1 + 2) * one_token)


def test_a_pass_with_a_drop_before_the_decoder():
    """Text 12 + 6 + 5, a half of 10 + 8 + 6 visual tokens in all layers: as a dense pass of the shorter stream."""
    geometry = DecoderGeometry.of(tiny_config().text_config)
    cost, supervised = TrainingCost(geometry, None, True, False), np.array([2, 1, 1])
    method = Given((Drop(0, 0.5),))
    ran = PassCost.of(cost, method.plan(segments(), 6), method, supervised)
    assert (ran.visual.entering, ran.visual.leaving, ran.visual.cached) == (12, 12, 12)
    lengths = np.array([[12 + 9], [6 + 3], [5]])
    assert ran.flops == cost.text(lengths, [6], supervised).sum()
    assert ran.cache_values == 6 * 35 * 2 * 16


def test_keys_left_out_are_counted_in_the_cache_alone():
    geometry = DecoderGeometry.of(tiny_config().text_config)
    cost, supervised = TrainingCost(geometry, None, True, False), np.array([2, 1, 1])
    method = method_class("plphp")(keep=0.5, delta=0.25, untouched=2)
    plan = method.plan(segments(), 6)
    assert kept_keys(method, [24], [6], 2) == pytest.approx([1, 1, 0.5, 0.5, 0.5, 0.5])
    ran, dense = (PassCost.of(cost, plan, m, supervised) for m in (method, None))
    assert ran.visual.entering == ran.visual.leaving == 24 and ran.visual.cached == pytest.approx(24 * 4 / 6)
    assert ran.text == dense.text and dense.selector == 0
    assert ran.selector == 4 * (30 + 12) * 2 * 32, "attention rows of one query row a segment, in four layers"
    assert dense.cache_values - ran.cache_values == pytest.approx(4 * 12 * 2 * 16)


def test_the_summaries_of_voco_stay_in_the_cache():
    sample = Sample((ImageTokens("a", 60, None), ImageTokens("b", 33, None)), text=20, answer=4)
    result = estimate(Subject("tiny", tiny_config(num_layers=6), method_class("voco")(tokens=2), "the test"), sample)
    assert result.visual.entering == 93 + 2 * 2 and result.visual.cached == pytest.approx(2 * 2)
    one_layer = DecoderGeometry.of(tiny_config().text_config).cache_bytes(20 + 2 * 2, 2)
    assert result.cache_prompt.pruned == pytest.approx(6 * one_layer)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_estimated(name):
    """The plan's tokens in every layer, at any depth; what a method cannot do without layers is a message."""
    method = method_class(name)()
    for depth in (6, 32):
        config = tiny_config(num_layers=depth)
        sample = Sample((ImageTokens("a", 60, None), ImageTokens("b", 33, None)), text=20, answer=4)
        result = estimate(Subject("tiny", config, method, "the test"), sample)
        plan = method.plan([SegmentLayout(113, (ImageSpan(0, 60), ImageSpan(60, 33)), (112,))], depth)
        counts = [n for n, stage in zip(visual_per_stage(plan), plan.stages, strict=True) for _ in
                  range(stage.first_layer, stage.end_layer)]  # fmt: skip
        assert result.visual.entering == pytest.approx(sum(counts) / depth)
        assert sum(stage.end_layer - stage.first_layer for stage in result.stages) == depth
        per_layer = 2 * 16 * 2
        cached = result.cache_prompt.pruned / per_layer / depth - 20
        assert cached == pytest.approx(result.visual.cached)
        assert result.cache_prompt.dense == per_layer * depth * 113


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("pyramiddrop", {"layers": (2, 4), "keep": (0.5, 0.2)}),
        ("divprune", {"keep": 0.3}),
        ("sparsevlm", {"layers": (1, 3), "count": "mass", "mass": 0.6}),
        ("lvlm_csp", {}),
        ("plphp", {}),
        ("voco", {}),
    ],
)
def test_what_is_measured_is_what_the_layers_see(name, values):
    """Rows that enter each layer of a prefill, and rows in its cache, against the counts of ``measured_answers``."""
    model = family_model("llava_next")
    inputs = family_inputs("llava_next", [["what is", 0, "shown here ?"], [1, "and", 2, "two ?"], ["a dog ?"]])
    loaded = Loaded(prune(model, method_class(name)(**values)), type("P", (), {"tokenizer": tokenizer()}), None)
    seen: dict[int, list[int]] = {}
    for index, layer in enumerate(model.model.language_model.layers):
        layer.register_forward_pre_hook(
            lambda _, args, index=index: seen.setdefault(index, []).append(args[0].shape[1])
        )
    measured = measured_answers(loaded, inputs, 3)
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    text = int(inputs["attention_mask"].sum()) - visual
    entering = [seen[index][0] - text for index in sorted(seen)]
    assert sum(one.entering for one in measured) == pytest.approx(sum(entering) / len(entering))
    assert sum(one.leaving for one in measured) == pytest.approx(sum([*entering[1:], entering[-1]]) / len(entering))
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    hidden = 2 if name == "voco" else 0  # "what is" of the first row; the second begins with its image
    held = [int(layer.num_tokens().sum()) - text + hidden for layer in cache.layers]
    assert sum(one.cached for one in measured) == pytest.approx(sum(held) / len(held))
    assert (held != entering) == (name in ("plphp", "voco"))
    assert measured[2].entering == measured[2].cached == 0 and measured[0].prefill_flops > 0


@pytest.mark.slow
def test_a_run_logs_what_its_batches_counted(tmp_path):
    """An adaptive method's record holds what it took, not what it was planned for."""
    runs = Runs(tmp_path)
    shared = ["train.max_steps=2", "pruning.method=sparsevlm", "pruning.layers=[0,1]"]
    runs.run("mass", *shared, "pruning.count=mass", "pruning.mass=0.4")
    for line in runs.metrics("mass"):
        assert line["visual_tokens_leaving"] <= line["visual_tokens_entering"] < line["visual_tokens"]
        assert 0 < line["flops_selector"] < line["flops"]
        text = line["tokens_stage_0"] - line["visual_tokens"]
        layers = [0, 1, 1, 2]
        stages = [line[f"tokens_stage_{i}"] - text for i in range(4)]
        mean = sum(n * count for n, count in zip(layers, stages, strict=True)) / 4
        assert line["visual_tokens_entering"] == pytest.approx(mean)
        values = 2 * 2 * 8 * 4  # keys and values, heads, head size, bytes
        assert line["cache_bytes"] == pytest.approx(4 * (mean + text) * values)


def test_costs_of_an_adaptive_pass_are_those_of_the_plan_that_ran():
    """A batch is planned by what is expected; its record counts what the device left."""
    geometry = DecoderGeometry.of(tiny_config().text_config)
    cost = TrainingCost(geometry, None, True, False)
    method = Given((Drop(2, 0.5, adaptive=True),), work=7.0)
    collate = Collator(None, None, None, None, method, cost)
    plan = method.plan(segments(), 6)
    ran = replan(plan, [np.array([1, 0, 2])])
    planned = {"flops_other": 100.0, "flops": -1.0, "flops_dense": 5.0, "tokens_stage_1": 35.0}
    batch = types.SimpleNamespace(costs=planned, targets_per_sample=(2, 1, 1))
    costs = collate.measured_costs(batch, ran)
    lengths = np.array([[30, 13], [12, 8], [5, 5]])
    assert costs["flops"] == pytest.approx(107 + cost.text(lengths, [2, 4], np.array([2, 1, 1])).sum())
    assert (costs["flops_selector"], costs["flops_dense"], costs["tokens_stage_1"]) == (7, 5, 26)
    assert costs["visual_tokens_entering"] == pytest.approx((2 * 24 + 4 * 3) / 6)
    assert costs["visual_tokens_leaving"] == pytest.approx((24 + 5 * 3) / 6)
    assert collate.measured_costs(types.SimpleNamespace(costs={}, targets_per_sample=()), ran) == {}
