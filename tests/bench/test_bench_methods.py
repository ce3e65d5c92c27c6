"""``vtprune bench-methods``: every number against a slow one, who is absent and why."""

import json

import pytest
import torch

from tests.support.checkpoints import save_data, save_folder, talkative
from vtprune_train import dense, prune, unprune
from vtprune_train.bench import latency
from vtprune_train.bench.rivals import rivals_of
from vtprune_train.cli import bench_methods, main
from vtprune_train.evaluation.answering import answers, load, open_image
from vtprune_train.evaluation.questions import normalized, read_questions
from vtprune_train.models.forward.padded import kept_tokens
from vtprune_train.pruning import method_class
from vtprune_train.viz.bench_report import plot, table

pytestmark = pytest.mark.slow

NAMES = "none,pyramiddrop,random,plphp,victor"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_data(tmp_path_factory.mktemp("data"), 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("saved"), None)


def options(folder, data, *more):
    return [
        "bench-methods", "--model", str(folder), "--data", str(data), "--images", str(data.parent / "images"),
        "--max_new_tokens", "5", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def compared(folder, data, tmp_path_factory):
    """One run: its output, results and folder."""
    out = tmp_path_factory.mktemp("out")
    more = ["--samples", "12", "--methods", NAMES, "--budget", "0.5,0.1", "--repeats", "1", "--batch_size", "3"]
    assert main(options(folder, data, *more, "--time_batch", "1,2", "--time_tokens", "3", "--out", str(out))) == 0
    return json.loads((out / "bench_methods.json").read_text()), out


def row_of(results, name, budget=None):
    return next(row for row in results["rows"] if (row["name"], row["budget"]) == (name, budget))


def test_who_takes_part(compared):
    """Whose first layer of six sees all tokens cannot take a tenth of them; Victor's registers were never trained."""
    results, _ = compared
    rows = [(row["name"], row["budget"]) for row in results["rows"]]
    assert rows == [("dense", None), ("pyramiddrop", 0.5), ("random", 0.5), ("random", 0.1), ("plphp", 0.5)]
    absent = {(one["name"], one["budget"]): one["reason"] for one in results["absent"]}
    assert absent.keys() == {("pyramiddrop", 0.1), ("plphp", 0.1), ("victor", 0.5), ("victor", 0.1)}
    assert (
        "which reaches 0.167 to 1.000" in absent["pyramiddrop", 0.1]
        and "has trained parameters" in absent["victor", 0.5]
    )
    text = table(results)
    assert "absent: victor at 0.5: victor has trained parameters" in text and "absent: pyramiddrop at 0.1: " in text
    assert {one["reason"] for one in results["left_out"]} == {"it has no image, so every method runs dense"}


@pytest.mark.parametrize("name", ["pyramiddrop", "random", "plphp"])
def test_quality_by_hand(compared, folder, data, name):
    """Question by question: greedy answers, and the divergence of one row of logits after another."""
    results, _ = compared
    questions = [q for q in read_questions(data, data.parent / "images", 12)[0] if q.images]
    loaded = load(str(folder), None)
    method = method_class(name)().for_budget(0.5, 6)
    row, whole = row_of(results, name, 0.5), row_of(results, "dense")
    assert row["settings"] == json.loads(json.dumps(method.settings()))
    equal, exact, exact_dense, divergences, entering = 0, 0, 0, [], []
    for question in questions:
        prompt = ([open_image(path) for path in question.images], question.turns)
        said = {}
        prune(loaded.model, method)
        said["pruned"] = normalized(answers(loaded, [prompt], max_new_tokens=5)[0])
        with dense(loaded.model):
            said["dense"] = normalized(answers(loaded, [prompt], max_new_tokens=5)[0])
        inputs = bench_methods.batch(loaded, [prompt])
        entering.append(sum(len(stage) for image in kept_tokens(loaded.model, inputs)[0] for stage in image[:1]))
        unprune(loaded.model)
        divergences += divergence_by_hand(loaded, inputs, method)
        equal += said["pruned"] == said["dense"]
        exact += said["pruned"] == normalized(question.reference)
        exact_dense += said["dense"] == normalized(question.reference)
    count = len(questions)
    assert results["settings"]["questions"] == count
    assert row["agreement"] == equal / count and row["exact_match"] == exact / count
    assert whole["exact_match"] == exact_dense / count and whole["agreement"] == 1 and whole["kl"] == 0
    assert row["kl"] == pytest.approx(sum(divergences) / len(divergences), rel=1e-3)
    if name == "random":  # one drop before the decoder
        assert row["entering"] == pytest.approx(sum(entering) / count)
    assert row["counted_by"] == ("cached" if name == "plphp" else "entering")
    assert row["taken_share"] == pytest.approx(row[row["counted_by"]] / row["visual_tokens"])


def divergence_by_hand(loaded, inputs, method):
    """KL(dense || pruned) at each token of the dense model's answer."""
    model = loaded.model
    with torch.no_grad():
        sequence = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        length, width = sequence.shape[1], inputs["input_ids"].shape[1]
        labels = sequence.clone()
        labels[:, :width] = -100
        more = {**inputs, "input_ids": sequence, "attention_mask": torch.ones_like(sequence), "labels": labels}
        whole = model(**more).logits[0].log_softmax(-1)
        prune(model, method)
        ours = model(**more).logits[0].log_softmax(-1)
        unprune(model)
    rows = range(width - 1, length - 1)
    return [float(sum(whole[r, w].exp() * (whole[r, w] - ours[r, w]) for w in range(whole.shape[1]))) for r in rows]


def test_clocks(compared):
    """Everything is timed at every batch size, dense is one, and the cache of a smaller budget is smaller."""
    results, _ = compared
    for row in results["rows"]:
        assert list(row["clock"]) == ["1", "2"]
        for own in row["clock"].values():
            for what in ("prefill", "decode", "train"):
                low, high = own[what]["spread"]
                assert 0 < low <= own[what]["seconds"] <= high
                assert own[what]["ratio"] == 1 if row["name"] == "dense" else own[what]["ratio"] > 0
            assert own["peak_bytes"] is None and own["no_training"] is None
    caches = [row_of(results, *key)["clock"]["2"]["cache_ratio"] for key in (("random", 0.1), ("random", 0.5))]
    assert caches[0] < caches[1] < row_of(results, "dense")["clock"]["2"]["cache_ratio"] == 1
    assert row_of(results, "plphp", 0.5)["clock"]["2"]["cache_ratio"] < 1


def test_ratios_are_those_of_one_repeat():
    """A machine that is three times slower in the second repeat changes no ratio."""
    times = {
        "dense": latency.Times([1, 3, 1], [1, 3, 1], [], 10.0),
        "x": latency.Times([2, 6, 2.2], [1, 1, 1], [], 5.0),
    }
    found = latency.summarized(times)["x"]
    assert found["prefill"]["ratio"] == 2 and found["prefill"]["seconds"] == 2.2 and found["train"] is None
    assert found["decode"]["ratio"] == 1 and found["cache_ratio"] == 0.5


def test_a_training_step_leaves_nothing_behind(folder, data):
    loaded = load(str(folder), None)
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    rivals, _ = rivals_of(["random"], [0.5], loaded, "varlen_sdpa")
    question = next(q for q in read_questions(data, data.parent / "images", 3)[0] if q.images)
    prompts = [([open_image(path) for path in question.images], question.turns)]
    keywords = {"sizes": [2], "repeats": 1, "new_tokens": 2, "attention": "varlen_sdpa"}
    times = latency.clocked(loaded, rivals, prompts, train=True, **keywords)[2]
    assert all(len(own.train) == len(own.prefill) == 1 for own in times.values())
    assert not loaded.model.training and all(p.grad is None for p in loaded.model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in loaded.model.state_dict().items())
    assert not latency.clocked(loaded, rivals, prompts, train=False, **keywords)[2]["dense"].train


def test_a_learned_method_takes_part_in_its_own_model(tmp_path):
    saved = save_folder(tmp_path / "saved", method_class("victor")(registers=3, layers=2), talkative())
    loaded = load(str(saved), None)
    rivals, absent = rivals_of(["victor", "voco"], [0.5], loaded, "varlen_sdpa")
    assert [rival.title for rival in rivals] == ["dense", "victor 0.5"]
    assert rivals[1].method.registers == 3, "as many as were trained"
    assert [one.name for one in absent] == ["voco"]


def test_the_plot_is_written(compared, tmp_path):
    """Also where no training step was timed."""
    results, out = compared
    assert (out / "bench_methods.png").stat().st_size > 20_000
    for row in results["rows"]:
        for own in row["clock"].values():
            own["train"] = None
    plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").is_file()
    lines = table(results).splitlines()
    assert lines[0].endswith("train x1  train x2  cache") and lines[1].split()[-3:-1] == ["-", "-"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--methods", "pyramid"], ["'pyramid' is unknown", "pyramiddrop"]),
        (["--budget", "0.5,1.5"], ["--budget: 1.5", "between 0 and 1"]),
        (["--time_tokens", "1"], ["--time_tokens=1 is below 2"]),
        (["--time_batch", "0"], ["--time_batch: 0"]),
        (
            ["--out", "/proc/nowhere", "--methods", "random", "--repeats", "1", "--samples", "1"],
            ["--out /proc/nowhere"],
        ),
    ],
)
def test_wrong_input(more, words, folder, data, capsys):
    assert main(options(folder, data, *more)) == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said
