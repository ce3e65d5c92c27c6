"""The comparison at equal time: standard errors, fitted steps, shared runs, reused answers, tables and plots."""

import importlib
import json
import math
import os
import sys

import numpy as np
import pytest

from tests.support.runner import ROOT
from vtprune_train import prune, unprune
from vtprune_train.bench import runs as bench_runs
from vtprune_train.bench.runs import Asked, Cells, Run, as_overrides, cell_name
from vtprune_train.bench.standard_errors import crossed_error, mean_and_error
from vtprune_train.bench.step_times import image_sizes, padded_batch, spread
from vtprune_train.bench.tasks import TASKS, Task, tasks_of
from vtprune_train.config.load import load_config
from vtprune_train.data import synthetic_text
from vtprune_train.pruning import method_class
from vtprune_train.training.loop.data import build_collator
from vtprune_train.training.loop.parts import build_parts, training_cost


@pytest.fixture(scope="module")
def comparing():
    """``comparing.NAME`` of the scripts."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield lambda name: importlib.import_module(f"comparing.{name}")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


# Standard errors


def test_the_error_is_that_of_repeated_experiments():
    """Seeds and images drawn again and again: the mean of the squared errors is the variance of the mean."""
    rng = np.random.default_rng(0)
    means, variances = [], []
    for _ in range(1500):
        seed, image = rng.normal(0, 0.3, (4, 1)), rng.normal(0, 1.0, (1, 20))
        values = seed + image + rng.normal(0, 0.8, (4, 20))
        means.append(values.mean())
        variances.append(crossed_error(values) ** 2)
    expected = 0.09 / 4 + 1 / 20 + 0.64 / 80
    assert np.var(means) == pytest.approx(expected, rel=0.1)
    assert np.mean(variances) == pytest.approx(expected, rel=0.1)


def test_questions_of_an_image_count_together():
    """Copies of a question add nothing; answers that are one image's count as one."""
    right = np.random.default_rng(1).integers(0, 2, (3, 30)).astype(float)
    images = [str(number) for number in range(30)]
    mean, error = mean_and_error(right, images)
    assert mean_and_error(np.repeat(right, 4, axis=1), np.repeat(images, 4)) == pytest.approx((mean, error))
    assert mean_and_error(np.repeat(right, 4, axis=1), [str(n) for n in range(120)])[1] < 0.75 * error
    assert (mean, error) == pytest.approx((right.mean(), crossed_error(right)))


def test_one_seed_gives_the_binomial_error():
    right = np.array([[1.0] * 30 + [0.0] * 10])
    mean, error = mean_and_error(right, [str(number) for number in range(40)])
    assert mean == 0.75 and error == pytest.approx(math.sqrt(0.75 * 0.25 / 39))
    assert math.isnan(mean_and_error(right, ["the same"] * 40)[1])


def test_what_all_models_share_cancels_in_a_difference():
    rng = np.random.default_rng(2)
    dense = rng.integers(0, 2, (3, 200)).astype(float)
    row = dense.copy()
    row[:, :10] = 0
    images = [str(number) for number in range(200)]
    difference, error = mean_and_error(row - dense, images)
    assert difference < 0 and error < 0.5 * mean_and_error(row, images)[1]


# Steps


def test_as_many_steps_as_fit(comparing):
    fitted = comparing("recipes").fitted_steps
    assert fitted(150, 1.0) == 150 and fitted(150, 0.75) == 200 and fitted(150, 2.0) == 75
    assert fitted(150, 0.7) == 214 and fitted(3, 100.0) == 1
    assert all(fitted(150, 150 / steps) == steps for steps in range(1, 600)), "not one step less from rounding"
    for ratio in (0.31, 0.77, 1.9):
        assert fitted(150, ratio) * ratio <= 150 < (fitted(150, ratio) + 1) * ratio


def test_the_ratio_of_step_times(comparing):
    ratio_and_error = comparing("recipes").ratio_and_error
    dense = [1.0, 3.0, 2.0, 2.0]  # a machine that is slow for a while
    assert ratio_and_error([0.5 * one for one in dense], dense) == pytest.approx((0.5, 0.0))
    ratio, error = ratio_and_error([1.1, 0.9, 1.1, 0.9], [1.0] * 4)
    assert ratio == pytest.approx(1.0) and error == pytest.approx(np.std([0.1, -0.1, 0.1, -0.1], ddof=1) / 2)


def test_timed_steps_are_spread_over_the_training():
    steps = spread(150, 24)
    assert len(steps) == 24 and steps == sorted(steps) and steps == spread(150, 24)
    assert all(150 * part // 24 <= step < -(-150 * (part + 1) // 24) for part, step in enumerate(steps))
    assert len({step % 10 for step in spread(1000, 100)}) == 10, "no period of ten is missed"


# Rows and runs


def test_rows(comparing, tmp_path):
    recipes = comparing("recipes")
    file = tmp_path / "recipe.yaml"
    file.write_text("pruning: {method: random, keep: 0.25}\ntrain: {clip: 0.5}\n")
    own = tmp_path / "recipes.yaml"
    own.write_text(f"full: [pruning.method=pyramiddrop, pruning.full_token_share=0.1]\nquarter: {file}\n")
    known = recipes.read_recipes(own)
    assert known["quarter"] == ('pruning.method="random"', "pruning.keep=0.25", "train.clip=0.5")

    def row(name):
        return recipes.row_of(name, TASKS["shapes"], 0.5, known, ["train.weight_decay=0.1"])

    assert row("none").method is None and row(recipes.PADDED).overrides == row("none").overrides
    assert row("random").method == method_class("random")().for_budget(0.5, 8)
    assert row("full").method == method_class("pyramiddrop")().for_budget(0.5, 8)
    assert row("quarter").method == method_class("random")(keep=0.25), "its own settings are kept"
    config = Run(TASKS["shapes"], row("full").overrides, 10, 0, tmp_path).config()
    assert config.pruning.build() == row("full").method and config.pruning.full_token_share == 0.1
    assert config.train.weight_decay == 0.1
    assert "with its defaults" in recipes.row_of("pyramiddrop", TASKS["shapes"], 0.05, {}, []).note
    with pytest.raises(ValueError, match="'pyramid' is neither a recipe"):
        row("pyramid")
    with pytest.raises(ValueError, match="'words' is not a task"):
        tasks_of("shapes,words")


def test_the_shipped_recipes_are_valid(comparing, tmp_path):
    recipes = comparing("recipes")
    for name in recipes.read_recipes():
        for task in TASKS.values():
            row = recipes.row_of(name, task, 0.5, recipes.read_recipes(), [])
            assert Run(task, row.overrides, 10, 0, tmp_path).config().pruning.build() == row.method


def test_runs_with_the_same_settings_are_shared(tmp_path):
    task = TASKS["shapes"]
    half = method_class("random")(keep=0.5)
    run = Run(task, as_overrides(half), 10, 0, tmp_path)
    assert run.folder == Run(task, ("pruning.method=random", "pruning.keep=0.5"), 10, 0, tmp_path).folder
    others = [
        Run(task, as_overrides(half), 11, 0, tmp_path), Run(task, as_overrides(half), 10, 1, tmp_path),
        Run(task, as_overrides(None), 10, 0, tmp_path), Run(TASKS["text"], as_overrides(half), 10, 0, tmp_path),
        Run(task, (*as_overrides(half), "train.clip=0.5"), 10, 0, tmp_path),
    ]  # fmt: skip
    assert len({one.folder for one in [run, *others]}) == 6
    config = run.config("x")
    assert config.train.max_steps == config.train.save_every == 10 and config.run.seed == 0 and not config.data.eval


def finish(run):
    """Mark a run as trained."""
    latest = run.folder / "checkpoints" / "latest"
    latest.parent.mkdir(parents=True, exist_ok=True)
    if not run.trained:  # a run that is written again has other answers
        latest.write_text(f"step_{run.steps:08d}")


def test_only_what_is_missing_is_done(tmp_path, monkeypatch):
    """Three runs, one of which is trained and has one of its two answers."""
    done, half, new = (Run(TASKS["shapes"], as_overrides(None), steps, 0, tmp_path) for steps in (1, 2, 3))
    method = method_class("random")()
    cells = Cells(tmp_path / "cells.json", {})
    for run in (done, half):
        finish(run)
        cells.put(run.folder, cell_name(None), {"exact_match": 0.5})
    cells.put(done.folder, cell_name(method), {"exact_match": 0.25})
    submitted = []

    class Pool:
        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def submit(self, function, run, methods, *_):
            submitted.append((run.steps, [cell_name(one) for one in methods]))
            finish(run)
            future = bench_runs.Future()
            future.set_result((1.0, {cell_name(one): {"exact_match": 0.75} for one in methods}))
            return future

    monkeypatch.setattr(bench_runs, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(bench_runs.Task, "write", lambda self: None)
    asked = [Asked(run, (method, None)) for run in (done, half, new)] + [Asked(half, (None,))]
    bench_runs.complete(asked, cells, images=5, batch_size=5, jobs=1)
    assert submitted == [(2, [cell_name(method)]), (3, [cell_name(method), "none"])]
    again = Cells(tmp_path / "cells.json", {})
    assert again.of(new.folder, "none") == {"exact_match": 0.75}
    submitted.clear()
    bench_runs.complete(asked, again, images=5, batch_size=5, jobs=1)
    assert not submitted


def test_a_cell_is_kept_until_its_run_is_trained_again(tmp_path):
    latest = tmp_path / "random" / "checkpoints" / "latest"
    latest.parent.mkdir(parents=True)
    latest.write_text("step_00000001")
    cells = Cells(tmp_path / "cells.json", {"images": 5})
    cells.put(tmp_path / "random", "none", {"exact_match": 0.5})
    again = Cells(tmp_path / "cells.json", {"images": 5})
    assert again.of(tmp_path / "random", "none") == {"exact_match": 0.5}
    assert again.of(tmp_path / "random", "uniform") is None
    assert Cells(tmp_path / "cells.json", {"images": 6}).of(tmp_path / "random", "none") is None
    os.utime(latest, ns=(1, 1))
    assert again.of(tmp_path / "random", "none") is None


# Reports


def test_the_matrix_as_tables_and_image(comparing, tmp_path):
    matrix = comparing("matrix")
    names = ["none", "random", "voco"]
    cost = {"flop_ratio": 0.7, "selector_share": 0.01, "entering_share": 0.5}
    cost |= {"leaving_share": 0.4, "final_loss": 1.25, "note": None}
    cells = {
        a: {b: {"exact_match": None if b == "voco" != a else 0.25, "reason": "it learns" if b == "voco" != a else None}
            for b in names} for a in names
    }  # fmt: skip
    result = {"budget": 0.5, "steps": 9, "questions": 4, "methods": dict.fromkeys(names, cost), "matrix": cells}
    result["methods"]["voco"] = {**cost, "note": "with its defaults: because"}
    text = matrix.markdown(result)
    assert "| random | 25.0 | 25.0 | - |" in text and text.count("voco, not available: it learns") == 1
    assert "- voco: with its defaults: because" in text and "| none | 0.700 | 1.00% | 0.500 | 0.400 | 1.250 |" in text
    matrix.heat_map(result, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5_000


@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
def test_the_comparison_as_table_and_plot(comparing, tmp_path, seeds):
    report, recipes = comparing("report"), comparing("recipes")
    images = [str(number) for number in range(20)]
    rng = np.random.default_rng(3)

    def row(share, seconds, note=None):
        dense, right = rng.random((2, len(seeds), 20)) < share
        found = recipes.estimate(right.astype(float), dense.astype(float), images)
        return {
            "note": note, "step_ratio": 0.75, "step_ratio_error": 0.01, "steps": 200, "seconds": seconds,
            "seconds_error": 0.5 if len(seeds) > 1 else None, "flop_ratio": 0.7, "taken_share": 0.5,
            "as_trained": found, "all_tokens": None,
        }  # fmt: skip

    rows = {"none": row(0.9, 40.0), "random": row(0.5, 39.0, "a note"), "pool": row(0.5, 39.5)}
    result = {"equal": "time", "steps": 150, "seeds": seeds, "images": 20, "measured_steps": 24}
    result["tasks"] = {"shapes": rows, "text": {**rows, "fastv": row(0.4, 38.0)}}
    text = report.recipes_table(json.loads(json.dumps(result)))
    own = rows["random"]["as_trained"]
    assert f"| {100 * own['exact_match']:.1f} ± {100 * own['error']:.1f} |" in text and "- random: a note" in text
    assert text.count("\n## ") == 2 and "| 0.75 ± 0.01 | 200 |" in text
    report.recipes_plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_labels_keep_their_distance(comparing):
    spaced = comparing("report").spaced
    assert spaced([1.0, 5.0, 9.0], 2.0) == [1.0, 5.0, 9.0]
    assert spaced([5.0, 5.0, 5.0], 2.0) == [3.0, 5.0, 7.0]
    heights = np.random.default_rng(4).random(12).tolist()
    moved = spaced(heights, 0.2)
    order = np.argsort(heights)
    assert (np.diff(np.array(moved)[order]) >= 0.2 - 1e-9).all() and np.mean(moved) == pytest.approx(np.mean(heights))


def test_the_budget_curve(comparing, tmp_path, monkeypatch):
    """From the answers to table and plot; models of equal settings are trained once."""
    budgets, recipes = comparing("budgets"), comparing("recipes")
    asked = []

    class Question:
        def __init__(self, number):
            self.sample = str(number // 2)

    def complete(self, some, cells):
        for one in some:
            asked.append(one.run)
            finish(one.run)
            (one.run.folder / "metrics.jsonl").write_text(json.dumps(STEP) + "\n")
            for method in one.methods:
                cells.put(one.run.folder, cell_name(method), {"right": "0110", "exact_match": 0.5})

    monkeypatch.setattr(recipes.Options, "complete", complete)
    monkeypatch.setattr(bench_runs.Task, "questions", lambda self, limit: [Question(number) for number in range(4)])
    options = recipes.Options(10, (0, 1), 2, 2, 1, tmp_path)
    result = budgets.curve(
        [TASKS["text"]], "pyramiddrop", [0.05, 0.35, 0.5, 1.0], ["pruning.full_token_share=0.5"], [], options
    )
    curves = result["tasks"]["text"]
    assert list(result["left_out"]) == ["0.05"] and list(curves["any budget"]) == ["0.35", "0.5", "1"]
    # Each seed: dense, two budgets and one for all of them.
    assert len({run.folder for run in asked}) == 2 * 4
    assert curves["dense"]["0.5"]["exact_match"] == 0.5 and curves["dense"]["0.5"]["seconds"] == 2.0
    text = budgets.curve_table(json.loads(json.dumps(result)))
    assert "| trained for | seconds | 0.35 | 0.5 | 1 |" in text and "- budget 0.05 left out: " in text
    budgets.curve_plot(result, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    for method, shares, message in (("pyramiddrop", [0.05], "reaches none"), ("victor", [0.5], "learned parameters")):
        with pytest.raises(ValueError, match=message):
            budgets.curve([TASKS["text"]], method, shares, [], [], options)


STEP = {
    "flops": 2.0, "flops_dense": 4.0, "flops_selector": 0.0, "visual_tokens": 8.0, "visual_tokens_entering": 4.0,
    "visual_tokens_leaving": 2.0, "loss": 1.0, "step_time": 2.0,
}  # fmt: skip


# With real runs


def write_small(folder, **_):
    synthetic_text.write_dataset(folder, num_train=24, num_eval=6, seed=1)


def tiny_task(folder):
    """The text task with a few images and small steps."""
    file = folder / "tiny.yaml"
    file.write_text(
        f"base: {ROOT / 'configs' / 'quickstart_text.yaml'}\ndata: {{root: {folder / 'data'}}}\n"
        "train: {global_batch_size: 4}\n"
    )
    return Task("tiny", str(file), write_small)


@pytest.mark.slow
def test_a_comparison_from_start_to_end(comparing, tmp_path, capsys):
    """Steps are timed, rows trained for the steps that fit, and answers counted; then all of it is reused."""
    recipes = comparing("recipes")
    task = tiny_task(tmp_path)
    rows = {"tiny": [recipes.row_of(name, task, 0.5, {}, []) for name in ("none", recipes.PADDED, "random")]}
    options = recipes.Options(4, (0,), 6, 3, 2, tmp_path / "runs")

    def compared():
        return recipes.compare([task], rows, "time", 2, options)

    result = compared()["tasks"]["tiny"]
    assert list(result) == ["none", "dense_padded", "random"] and result["none"]["step_ratio"] == 1
    for name, row in result.items():
        assert row["steps"] == recipes.fitted_steps(4, row["step_ratio"]) and row["seconds"] > 0
        assert 0 <= row["as_trained"]["exact_match"] <= 1 and len(row["as_trained"]["seeds"]) == 1
        assert row["taken_share"] == pytest.approx(0.5 if name == "random" else 1, abs=0.05)
    assert not (tmp_path / "runs" / "tiny" / "step_times").exists()
    capsys.readouterr()
    assert compared()["tasks"]["tiny"] == result and not capsys.readouterr().out, "nothing is done again"


def test_padded_batches_have_the_packed_loss(tmp_path):
    """The row in transformers' own code trains on the same tokens and targets."""
    task = tiny_task(tmp_path)
    task.write()
    config = load_config(task.recipe, ["pruning.method=none", f"run.output_dir={tmp_path}"])
    parts = build_parts(config)
    collate = build_collator(config, parts, training_cost(config, parts.model.config), None, "train")
    packed, model = collate([3, 0, 5], None, step=0), parts.model
    prune(model, None)
    loss = model(packed).loss_sum / len(packed.targets)
    unprune(model)
    inputs = padded_batch(packed, image_sizes(collate, [3, 0, 5]))
    assert inputs["input_ids"].shape[0] == 3 and int(inputs["attention_mask"].sum()) == len(packed.input_ids)
    assert float(model(**inputs, use_cache=False).loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-4)
