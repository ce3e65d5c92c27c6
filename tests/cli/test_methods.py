"""``vtprune methods``; methods of one's own, as the page on them shows; every setting on the command line."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import yaml

from tests.support.checkpoints import HALF, save_folder, save_images
from tests.support.families import family_inputs, family_model
from tests.support.runner import ROOT, Runs
from vtprune_train import FastV, PyramidDrop, is_pruned, kept_tokens, prune, unprune
from vtprune_train.cli import main
from vtprune_train.config.pruning import PruningConfig
from vtprune_train.evaluation.answering import load
from vtprune_train.models.patch import method_of
from vtprune_train.pruning import METHODS, method_class, method_from_settings, setting_types
from vtprune_train.pruning.contract import check_method

pytestmark = pytest.mark.slow

NAMES = [
    "pyramiddrop", "sparsevlm", "plphp", "fastv", "dart", "feather", "prumerge", "fopru", "vtc_cls", "visionzip",
    "divprune", "cdpruner", "scope", "hiprune", "vispruner", "idpruner", "evs", "vidcom2", "dycoke", "prunevid",
    "videollm_mod", "victor", "voco", "hidrop", "lvlm_csp", "zipvl", "random", "uniform", "pool", "none",
]  # fmt: skip
PAGE = (ROOT / "docs" / "methods" / "own.md").read_text()


def said(capsys, *command):
    assert main(list(command)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ the list


def test_names_alone_are_one_a_line(capsys):
    assert said(capsys, "methods", "--names").splitlines() == NAMES


def test_the_list_states_everything(capsys):
    facts = json.loads(said(capsys, "methods", "--json"))
    assert [fact["name"] for fact in facts] == NAMES
    listed = said(capsys, "methods")
    assert [line for line in listed.splitlines() if line and not line.startswith(" ")] == NAMES
    for fact in facts[:-1]:
        name = fact["name"]
        assert fact["where"] and fact["trains"] and fact["doc"], name
        assert method_class(name).name == name
        assert name in ("random", "uniform", "pool") or re.search(r"\(arXiv \d{4}\.\d{5}\)$", fact["paper"]), name
        assert [s["name"] for s in fact["settings"]] == list(setting_types(method_class(name)))
        defaults = {s["name"]: s["default"] for s in fact["settings"]}
        assert defaults.pop("per") == "video", "settings have it only if it is not the default"
        assert method_from_settings({"method": name, **defaults}).settings() == {"method": name, **defaults}, name


def test_one_in_full(capsys):
    page = said(capsys, "methods", "pyramiddrop")
    assert "arXiv 2410.17247" in page and "keep               " in page and "last_visual" in page and "Args:" in page
    assert json.loads(said(capsys, "methods", "pyramiddrop", "--json"))["settings"][1]["default"] == [0.5, 0.25, 0.125]
    assert main(["methods", "tome"]) == 2
    assert "method='tome' is unknown; known methods: pyramiddrop, sparsevlm" in capsys.readouterr().err
    assert main(["methods", "fastvv", "--names"]) == 2
    assert "did you mean fastv?" in capsys.readouterr().err


def test_every_page_is_there():
    pages = {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")}
    for name in METHODS:
        assert name in pages, name


# ------------------------------------------------------------------------------------------------ one's own


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The page's file in a folder of its own, which is the working folder."""
    method, ranked = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(method.splitlines()) <= 25
    (tmp_path / "outliers.py").write_text(f"{method}\n\n{ranked}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("outliers", None)


def test_the_page_s_method_trains_and_is_found_again(own, capsys):
    """In two ranks with loader workers, from the page's YAML; then from the checkpoint."""
    runs = Runs(own / "training")
    [section] = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
    section["pruning"]["method"] = f"{own}/outliers.py:Outliers"
    settings = yaml.safe_load(runs.config.read_text())
    runs.config.write_text(yaml.safe_dump({**settings, **section}))
    runs.run("own", "data.workers=2", "run.stop_after=2", ranks=2)
    metrics = runs.metrics("own")
    assert metrics[0]["tokens_stage_1"] < metrics[0]["tokens_stage_0"]
    runs.run("own", "data.workers=2", "run.stop_after=3", ranks=2)
    with pytest.raises(ValueError, match=f"was saved with the method {own}/outliers.py:Outliers, which is not part"):
        load(str(runs.directory("own")))
    loaded = load(str(runs.directory("own")), trust_remote_code=True)
    assert method_of(loaded.model).settings() == section["pruning"]
    sys.modules.pop("outliers")
    picture = str(next((own / "training" / "data" / "images").glob("train-0-*.png")))
    ask = ["generate", "--model", str(runs.directory("own")), "--image", picture, "--prompt", "how bright is it?"]
    assert main(ask) == 2
    assert "or pass --trust_remote_code" in capsys.readouterr().err
    said(capsys, *ask, "--max_new_tokens", "2", "--trust_remote_code")
    (own / "outliers.py").rename(own / "moved.py")
    assert main([*ask, "--trust_remote_code"]) == 2
    error = capsys.readouterr().err
    assert f"file {own}/outliers.py does not exist" in error and "correct the path" in error


def test_the_page_s_commands(own, capsys):
    save_folder(own / "runs" / "quickstart", HALF)
    save_images(own, 1)[0].rename(own / "cat.jpg")
    [block] = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.strip().splitlines():
        assert said(capsys, *re.sub(r'"[^"]*"', "what", line).split()[1:]), line


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere.py:Outliers", "file nowhere.py does not exist in"),
        ("outliers.py:Inliers", "outliers.py does not define Inliers; did you mean Outliers?"),
        ("outliers.py:Drop", "must be a subclass of PruningMethod"),
        ("json.py:Mine", "another module is already named json"),
        ("no.such.module:Mine", "cannot be imported: No module named 'no'"),
    ],
)
def test_what_is_not_found_is_named(own, path, words):
    (own / "json.py").write_text("")
    with pytest.raises(ValueError, match=re.escape(words)):
        method_from_settings({"method": path})


PARTS = """
from dataclasses import dataclass
from typing import ClassVar

import torch

from vtprune_train.pruning.base import PruningMethod
from vtprune_train.core.stream import Drop


class Whole(PruningMethod):
    name = "whole"

    def drops(self, num_layers):
        return (Drop(1, 0.5),)

    def score(self, candidates):
        return torch.arange(len(candidates.hidden))


class Nowhere(PruningMethod):
    name = "nowhere"


class Needy(Whole):
    needs = {"rank_with": "this_layer"}


class Scoreless(PruningMethod):
    name = "scoreless"
    drops = Whole.drops


class Keyless(PruningMethod):
    name = "keyless"

    def key_layers(self, num_layers):
        return (0,)


class Pairs(Whole):
    def drops(self, num_layers):
        return ((1, 0.5),)


class Deep(Whole):
    def drops(self, num_layers):
        return (Drop(99, 0.5),)


class Back(Whole):
    def drops(self, num_layers):
        return (Drop(2, 0.5), Drop(1, 0.25))


class More(Whole):
    def drops(self, num_layers):
        return (Drop(1, 1.5),)


class DeepKeys(Keyless):
    def key_layers(self, num_layers):
        return (num_layers,)

    def keys(self, layer, ranking, boundary):
        return None


class Flat(Whole):
    def score(self, candidates):
        return torch.zeros(3)


class Mute(Whole):
    def score(self, candidates):
        return None


class Bare(Whole):
    keep: float
    drops = Whole.drops
"""


@pytest.fixture
def parts_of_a_method(own):
    """A module of classes that each lack something, and one that lacks nothing."""
    (own / "lacking.py").write_text(PARTS)
    yield own
    sys.modules.pop("lacking", None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Nowhere", "must implement drops(num_layers) or key_layers"),
        ("Needy", "needs is {'rank_with': 'this_layer'}; it must be a property that returns Needs(...)"),
        ("Scoreless", "drops tokens but implements neither score(candidates) nor"),
        ("Keyless", "does not implement keys("),
        ("Pairs", "drops(4) must return a tuple of Drop(layer, keep), not ((1, 0.5),)"),
        ("Deep", "drops(4): layer 99 does not exist; use 0 to 3"),
        ("Back", "drops(4): layers [2, 1] must be in ascending order"),
        ("More", "drops(4): keep=1.5 before layer 1 must be between 0 and 1"),
        ("DeepKeys", "key_layers(4) returned layer 4, which does not exist; use 0 to 3"),
    ],
)
def test_a_class_that_lacks_a_part_is_refused(parts_of_a_method, name, words):
    check_method(method_from_settings({"method": "lacking.py:Whole"}), 4)
    with pytest.raises(ValueError, match="^" + re.escape(f"lacking.py:{name}") + ".*" + re.escape(words)):
        check_method(method_from_settings({"method": f"lacking.py:{name}"}), 4)


@pytest.mark.parametrize(("name", "given"), [("Flat", "a tensor [3]"), ("Mute", "None")])
def test_scores_of_another_shape_are_refused(parts_of_a_method, capsys, name, given):
    save_folder(parts_of_a_method / "model", HALF)
    (picture,) = save_images(parts_of_a_method, 1)
    ask = [
        "generate",
        "--model",
        "model",
        "--image",
        str(picture),
        "--prompt",
        "what?",
        "--method",
        f"lacking.py:{name}",
    ]
    assert main(ask) == 2
    assert f"lacking.py:{name}: score(candidates) returned {given}; return a tensor" in capsys.readouterr().err


def test_a_setting_without_a_default_is_asked_for(parts_of_a_method, capsys):
    assert main(["methods", "lacking.py:Bare"]) == 0
    assert "keep  required  (float)" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"^keep of lacking\.py:Bare has no default; set it"):
        method_from_settings({"method": "lacking.py:Bare"})
    assert method_from_settings({"method": "lacking.py:Bare", "keep": 0.5}).keep == 0.5


def test_a_file_that_python_cannot_read_is_named(own):
    (own / "broken.py").write_text("class Mine(:\n")
    with pytest.raises(
        ValueError, match=r"method='broken.py:Mine' cannot be imported: invalid syntax \(broken.py, line 1\)$"
    ):
        method_from_settings({"method": "broken.py:Mine"})


def test_the_page_s_ranked_method(own):
    model = prune(family_model("llava_next"), {"method": "outliers.py:Attended", "layer": 1})
    inputs = family_inputs("llava_next", [[0, "what is shown here ? assistant :"]])
    [[[kept]]] = kept_tokens(model, inputs)
    unprune(model)
    prune(model, FastV(layer=1, keep=0.25))
    assert kept.tolist() == kept_tokens(model, inputs)[0][0][0].tolist()


OLD = """
from dataclasses import dataclass
from typing import ClassVar

from vtprune_train import Drop, FastV, PruningMethod


@dataclass(frozen=True)
class Decorated(PruningMethod):
    keep: float = 0.5
    name: ClassVar[str] = "decorated"

    def drops(self, num_layers):
        return (Drop(1, self.keep),)

    def score(self, candidates):
        return candidates.hidden[:, 0]
"""
STATED = """

@dataclass(frozen=True)
class Ranked(Decorated):
    rank_with: ClassVar[str] = "this_layer"
    positions: str = "renumber"
"""
ASSIGNED = """

class Ranked(FastV):
    rotary = False
"""


@pytest.mark.parametrize(
    ("source", "returned"),
    [
        (STATED, "Needs(rank_with=self.rank_with, positions=self.positions)"),
        (ASSIGNED, "replace(super().needs, rotary=self.rotary)"),
    ],
)
def test_a_method_of_the_earlier_contract_is_told_what_to_write(own, source, returned):
    """One that only drops and scores still works, decorator and all."""
    (own / "old.py").write_text(OLD)
    method = method_from_settings({"method": "old.py:Decorated", "keep": 0.25})
    assert method.name == "decorated" and check_method(method, 4) is None
    with pytest.raises(ValueError, match="keep=True is invalid"):
        type(method)(keep=True)
    with pytest.raises(FrozenInstanceError):
        method.keep = 0.5
    (own / "older.py").write_text(OLD + source)
    with pytest.raises(
        ValueError,
        match=r"older\.py, line \d+\): ValueError: Ranked\.(.|\n)*def needs\(self\):\n +return " + re.escape(returned),
    ):
        method_from_settings({"method": "older.py:Ranked"})
    for module in ("old", "older"):
        sys.modules.pop(module, None)


def test_an_importable_module_serves_too(own):
    sys.path.append(str(own))
    made = method_from_settings({"method": "outliers:Outliers", "keep": 0.5})
    assert made.settings() == {"method": "outliers:Outliers", "layer": 2, "keep": 0.5}
    assert method_from_settings(made.settings()) == made


# ------------------------------------------------------------------------------------------------ combinations


def test_the_page_on_combinations(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "methods" / "combinations.md").read_text()
    save_folder(tmp_path / "runs" / "quickstart", None)
    save_images(tmp_path, 1)[0].rename(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    [block] = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    train, generate = block.strip().splitlines()
    report = said(capsys, *shlex.split(train)[1:])
    assert "random + pyramiddrop: before layers 0, 2, 4, 6 of 8 it keeps 0.5, 0.5, 0.25, 0.125" in report
    assert said(capsys, *shlex.split(generate)[1:])
    [section] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    method = PruningConfig(**yaml.safe_load(section)["pruning"]).build()
    assert [part.name for part in method.parts] == ["visionzip", "pyramiddrop", "plphp"]


# ------------------------------------------------------------------------------------------------ options


def drops_of(capsys, tmp_path, *options):
    """What estimate says of the method that the options name."""
    report = tmp_path / "report.json"
    said(capsys, "estimate", "--model", "llava-hf/llava-1.5-7b-hf", "--json", str(report), *options)
    return json.loads(report.read_text())["pruning"]


def test_any_setting_can_be_set(capsys, tmp_path):
    found = drops_of(
        capsys, tmp_path, "--method", "pyramiddrop", "--set", "positions=keep", "--set", "keep=[0.4,0.2,0.1]"
    )
    assert found["positions"] == "keep" and found["keep"] == [0.4, 0.2, 0.1]
    (tmp_path / "some.yaml").write_text("pruning: {method: pyramiddrop, layers: [3], keep: [0.3], warmup: {steps: 3}}")
    found = drops_of(capsys, tmp_path, "--method", str(tmp_path / "some.yaml"), "--set", "rank_with=this_layer")
    assert (found["layers"], found["keep"], found["rank_with"]) == ([3], [0.3], "this_layer")


@pytest.mark.parametrize("command", ["generate", "show"])
def test_set_changes_what_is_saved(capsys, tmp_path, monkeypatch, command):
    folder, picture = save_folder(tmp_path / "model", HALF), save_images(tmp_path, 1)[0]
    asked = []
    monkeypatch.setattr(f"vtprune_train.cli.{'options' if command == 'generate' else 'show'}.load", asking(asked))
    out = ["--out", str(tmp_path / "x.png")] if command == "show" else []
    common = [command, "--model", str(folder), "--image", str(picture), "--prompt", "what ?", *out]
    assert main([*common, "--set", "positions=keep"]) == 2
    assert main([*common, "--method", "pyramiddrop", "--layers", "3", "--keep", "0.5"]) == 2
    assert asked[0] == PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), positions="keep")
    assert asked[1] == PyramidDrop(layers=(3,), keep=(0.5,))
    for option, words in (
        (["--set", "kep=[0.5,0.2]"], "'kep' is not a setting of pyramiddrop; did you mean keep?"),
        (["--set", "keep"], "--set keep: write key=value"),
        (["--set", "method=random"], "--set method=random: the method is not one of its settings"),
        (["--set", "keep=high"], "keep='high'"),
    ):
        assert main([*common, *option]) == 2
        assert words in capsys.readouterr().err


def asking(asked):
    def refuse(path, method, **_):
        asked.append(method)
        raise ValueError("only looked at")

    return refuse


def test_numbers_serve_where_a_method_takes_one(own):
    from vtprune_train.cli.options import changed

    assert changed({"method": "outliers.py:Outliers"}, {"keep": [0.3]})["keep"] == 0.3
    assert changed({"method": "pyramiddrop"}, {"keep": [0.3]})["keep"] == [0.3]


def test_a_list_on_the_command_line(capsys, tmp_path, own):
    folder = save_folder(tmp_path / "model", None)
    listed = "[{method: outliers.py:Outliers, keep: 0.5}, pyramiddrop]"
    picture = save_images(tmp_path, 1)[0]
    said(capsys, "generate", "--model", str(folder), "--image", str(picture), "--prompt", "what ?", "--method", listed)
    loaded = load(str(folder), method_from_settings({"method": yaml.safe_load(listed)}))
    assert is_pruned(loaded.model)
    assert [part["method"] for part in loaded.model.config.pruning["method"]] == ["outliers.py:Outliers", "pyramiddrop"]


def test_as_a_user_calls_it():
    script = Path(sys.executable).parent / "vtprune"
    done = subprocess.run([script, "methods", "--names"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == NAMES


def test_a_reader_who_has_seen_enough():
    """As ``vtprune methods | head -1``: the pipe is closed before the list is printed."""
    script = Path(sys.executable).parent / "vtprune"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([script, "methods"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
