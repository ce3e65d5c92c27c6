"""``vtprune search``: against brute force, against answers really generated, and as a command."""

import re

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.checkpoints import save_data, save_folder, save_run
from tests.support.helpers import tiny_config
from vtprune_train import PyramidDrop, is_pruned, prune
from vtprune_train.bench.calibration import calibrate, prompts_with_images
from vtprune_train.cli import main
from vtprune_train.cli.search import SLOPES, best_sigmoid, flop_share, least_levels, schedule_of, sigmoid_levels
from vtprune_train.config.load import load_config
from vtprune_train.core.flops import DecoderGeometry, selector_flops
from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.evaluation.answering import batch, load, open_image
from vtprune_train.evaluation.questions import read_questions

weights = st.lists(st.floats(0.0, 3.0), min_size=1, max_size=7)


def falling(weight, steps):
    """A distance that grows as levels fall, each layer by its own weight."""
    return lambda levels: sum(w * (1 - level / steps) ** 2 for w, level in zip(weight, levels, strict=True))


def test_a_tolerance_met_exactly_is_met():
    assert least_levels(lambda levels: 0.0, 4, 10, 0.0) == [1, 1, 1]


@settings(max_examples=25, deadline=None)
@given(weight=weights, steps=st.integers(1, 9), tolerance=st.floats(0.0, 4.0))
def test_bisection_finds_what_trying_every_level_finds(weight, steps, tolerance):
    distance, count = falling(weight, steps), len(weight)
    expected = []
    for place in range(count):
        for level in range(1, steps + 1):
            if distance(expected + [level] * (count - place)) <= tolerance * (place + 1) / count:
                break
        expected.append(min(level, expected[-1]) if expected else level)
    found = least_levels(distance, count + 1, steps, tolerance)
    assert found == expected
    assert found == sorted(found, reverse=True) and distance(found) <= tolerance


def test_a_sigmoid_by_hand():
    """Half of all at half of the depth, 1 / (1 + e) a quarter of it behind; the last layers keep one level."""
    assert sigmoid_levels(4, 100, 4.0, 0.5) == [73, 50, 27]
    assert sigmoid_levels(4, 10, 64.0, 0.3) == [10, 1, 1]


@settings(max_examples=25, deadline=None)
@given(weight=weights, steps=st.integers(2, 9), budget=st.floats(0.3, 1.0))
def test_the_best_sigmoid_is_the_best_of_a_fine_grid(weight, steps, budget):
    distance, num_layers = falling(weight, steps), len(weight) + 1

    def cost(levels):
        return (steps + sum(levels)) / steps / num_layers

    if cost([1] * (num_layers - 1)) > budget:
        with pytest.raises(ValueError, match="cannot be reached"):
            best_sigmoid(distance, cost, num_layers, steps, budget)
        return
    found = best_sigmoid(distance, cost, num_layers, steps, budget)
    assert cost(found) <= budget
    tried = [
        levels
        for slope in SLOPES
        for middle in np.linspace(-3, 4, 400)
        if cost(levels := sigmoid_levels(num_layers, steps, slope, middle)) <= budget
    ]
    assert distance(found) <= min(map(distance, tried), default=np.inf) + 1e-9


def test_levels_become_drops_where_they_fall():
    method = schedule_of([10, 10, 7, 7, 2], 10, {"positions": "keep"})
    assert method == PyramidDrop(layers=(3, 5), keep=(0.7, 0.2), positions="keep")
    assert schedule_of([10, 10, 10, 10, 10], 10, {}) is None


@pytest.mark.parametrize("rank_with", ["next_layer", "this_layer"])
def test_flops_are_those_of_the_plan(rank_with):
    geometry = DecoderGeometry.of(tiny_config().text_config)
    method = PyramidDrop(layers=(2, 4), keep=(0.5, 0.2), rank_with=rank_with)
    total = dense = 0.0
    for text, visual in ((7, 30), (4, 12)):
        plan = method.plan([SegmentLayout(text + visual, (ImageSpan(2, visual),), (text + visual - 1,))], 6)
        for stage in plan.stages:
            layers = stage.end_layer - stage.first_layer
            total += float(geometry.layer(np.array([stage.num_tokens])).sum()) * layers
        total += selector_flops(geometry, plan, method)
        dense += float(geometry.layer(np.array([text + visual])).sum()) * 6
    assert flop_share(method, geometry, np.array([7, 4]), np.array([30, 12])) == pytest.approx(total / dense)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    save_run(folder / "run")
    save_folder(folder / "plain", None)
    save_data(folder)
    return folder


def test_closeness_is_that_of_generated_answers(folder):
    questions, _ = read_questions(folder / "val.json", folder / "images")
    prompts = list(prompts_with_images(questions, open_image))
    loaded = load(str(folder / "run"), None)
    calibration = calibrate(loaded, prompts, max_new_tokens=6, batch_size=3)
    assert not is_pruned(loaded.model) and 0 < len(prompts) < len(questions)
    nothing = calibration.closeness(PyramidDrop(layers=(2, 4), keep=(1.0, 1.0)))
    assert nothing.kl < 1e-5 and nothing.match == 1
    method = PyramidDrop(layers=(1, 2), keep=(0.5, 0.06))
    found = calibration.closeness(method)
    assert not is_pruned(loaded.model)
    references = []
    for prompt in prompts:
        inputs = batch(loaded, [prompt])
        with torch.no_grad():
            done = loaded.model.generate(
                **inputs, do_sample=False, max_new_tokens=6, output_logits=True, return_dict_in_generate=True
            )
        references.append((inputs, done.sequences[0, inputs["input_ids"].shape[1] :], torch.cat(done.logits)))
    prune(loaded.model, method)
    kl, count, matched = 0.0, 0, []
    for inputs, tokens, logits in references:  # one token at a time, through the cache
        with torch.no_grad():
            out = loaded.model(**inputs, use_cache=True)
            matched.append(True)
            for step in range(len(tokens)):
                ours, dense = out.logits[0, -1].log_softmax(-1), logits[step].log_softmax(-1)
                matched[-1] &= bool(ours.argmax() == dense.argmax())
                kl, count = kl + float((dense.exp() * (dense - ours)).sum()), count + 1
                mask = torch.ones(1, inputs["input_ids"].shape[1] + step + 1, dtype=torch.long)
                out = loaded.model(
                    input_ids=tokens[step : step + 1][None], attention_mask=mask, past_key_values=out.past_key_values
                )
    assert found.match == pytest.approx(np.mean(matched)) and 0 < found.match < 1
    assert found.kl == pytest.approx(kl / count, rel=1e-3)


@pytest.mark.parametrize("goal", [["--kl", "0.4"], ["--match", "0.5"], ["--flops", "0.7"]], ids=lambda goal: goal[0])
def test_the_command_writes_what_train_and_generate_take(folder, capsys, goal):
    out = folder / f"searched{goal[0]}.yaml"
    data = ["--data", str(folder / "val.json"), "--images", str(folder / "images"), "--limit", "6"]
    command = ["search", "--model", str(folder / "run"), *data, "--steps", "8", "--max_new_tokens", "4"]
    assert main([*command, "--out", str(out), *goal]) == 0
    assert capsys.readouterr().out == out.read_text()
    section = yaml.safe_load(out.read_text())["pruning"]
    assert section["method"] == "pyramiddrop" and section["rank_with"] == "this_layer"
    assert max(section["layers"]) < 6
    config = load_config("quickstart.yaml", [f"pruning={out}"])  # of 8 layers
    assert config.pruning.build().settings() == section
    prompt = ["--image", str(folder / "images" / "0.png"), "--prompt", "what is a cat ?", "--max_new_tokens", "3"]
    assert main(["generate", "--model", str(folder / "plain"), *prompt, "--method", str(out)]) == 0
    share, kl, match = (
        float(re.search(pattern, out.read_text())[1])
        for pattern in (r"(\S+) of the dense", r"answers (\S+),", r"(\S+) of the answers")
    )
    reached = {"--kl": kl <= 0.4, "--match": match >= 0.5, "--flops": share <= 0.7}
    assert reached[goal[0]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--flops", "0.01"], "--flops=0.01 cannot be reached"),
        (["--flops", "2"], "--flops=2 is not in (0, 1]"),
        (["--kl", "-1"], "--kl=-1 is negative"),
        (["--kl", "0.1", "--steps", "0"], "--steps=0 is below 1"),
        (["--kl", "0.1", "--steps", "1"], "--steps=1 is below 2"),
        (["--kl", "0.1", "--set", "keep=[0.5]"], "--set keep: the search decides it"),
        (["--kl", "0"], "no token can be dropped"),
        (["--kl", "0.1", "--out", "nowhere/x.yaml"], "its folder does not exist"),
    ],
)
def test_wrong_options_are_named(folder, capsys, options, words):
    data = ["--data", str(folder / "val.json"), "--images", str(folder / "images"), "--limit", "3"]
    assert main(["search", "--model", str(folder / "run"), *data, "--out", str(folder / "x.yaml"), *options]) == 2
    assert words in capsys.readouterr().err
