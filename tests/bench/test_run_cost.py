"""The mean cost of a run's steps, and GPU hours."""

import json
from dataclasses import replace

import pytest

from vtprune_train import DivPrune, PyramidDrop
from vtprune_train.bench.costs import ImageTokens, Sample, Subject, estimate
from vtprune_train.bench.run_cost import run_cost
from vtprune_train.cli import main
from vtprune_train.models.families import KNOWN_CONFIGS
from vtprune_train.models.io.build import load_any_config
from vtprune_train.pruning.phases import Budgets, FullTokens, Phases, Warmup

MODEL = "llava-hf/llava-1.5-7b-hf"
SAMPLE = Sample((ImageTokens("image", 576, 1),), text=61, answer=60)


@pytest.fixture(scope="module")
def subject():
    assert MODEL in KNOWN_CONFIGS
    method = PyramidDrop(layers=(8, 16, 24))
    return Subject(MODEL, load_any_config(MODEL, "test", offline=True), method, "a test")


def test_without_phases_it_is_the_cost_of_a_step(subject):
    cost = run_cost(subject, SAMPLE, Phases(subject.method))
    assert cost.whole and cost.step == estimate(subject, SAMPLE).training_whole and cost.hours is None
    eased = run_cost(subject, SAMPLE, Phases(subject.method, warmup=Warmup(5)))
    assert eased.step == cost.step, "a warm-up is a small part of a run"


def test_steps_on_all_tokens_count_with_their_share_and_their_teacher(subject):
    plain = estimate(subject, SAMPLE).training_whole
    full = run_cost(subject, SAMPLE, Phases(subject.method, full=FullTokens(0.25))).step
    assert full.pruned == pytest.approx(0.75 * plain.pruned + 0.25 * plain.dense)
    taught = run_cost(subject, SAMPLE, Phases(subject.method, full=FullTokens(0.25, 1.0))).step
    teacher = (taught.pruned - full.pruned) / 0.25
    decoder = estimate(subject, SAMPLE).training_decoder.pruned
    assert teacher == pytest.approx(decoder / 3, rel=0.02), "a forward pass is a third of forward and backward"


def test_drawn_budgets_are_averaged(subject):
    costs = [
        run_cost(replace(subject, method=m), SAMPLE, Phases(m, 3, varied=Budgets(0.2, 0.6, 32))).step.pruned
        for m in (DivPrune(), PyramidDrop())
    ]
    ends = [
        estimate(replace(subject, method=DivPrune().for_budget(share, 32)), SAMPLE).training_whole.pruned
        for share in (0.2, 0.6)
    ]
    assert ends[0] < costs[0] < (ends[0] + ends[1]) / 2, "log-uniform: small budgets are more frequent"
    assert costs[1] == pytest.approx(costs[0], rel=0.05), "the same mean number of tokens"


def test_gpu_hours(subject, tmp_path, capsys):
    step = estimate(subject, SAMPLE).training_whole
    hours = run_cost(subject, replace(SAMPLE, batch=4), Phases(subject.method), 665_000, 100.0).hours
    assert hours.dense == pytest.approx(665_000 * step.dense / 100e12 / 3600)
    assert hours.ratio == pytest.approx(step.ratio)
    out = tmp_path / "estimate.json"
    asked = ["estimate", "--config", "llava_next_any_budget.yaml", "--resolution", "672x672", "--samples", "1000000"]
    assert main([*asked, "--tflops", "150", "--json", str(out)]) == 0
    report, printed = json.loads(out.read_text())["run"], capsys.readouterr().out
    assert "a budget of 0.1 to 1 at each step (KL weight 1 to a pass that keeps more)" in printed
    assert report["hours"]["ratio"] == pytest.approx(report["step"]["ratio"])
    assert f"{report['hours']['dense']:.1f}" in printed and 1.2 < report["hours"]["ratio"] < 2
    assert main(asked) == 2
    assert "--samples has no effect without --tflops" in capsys.readouterr().err
