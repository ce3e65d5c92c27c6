"""Settings: every error at once, with key, value and way out."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from pydantic import BaseModel

from vtprune_train import PruningMethod, PyramidDrop
from vtprune_train.cli.checkpoint import schedule
from vtprune_train.config.data import SourceConfig
from vtprune_train.config.errors import ConfigError
from vtprune_train.config.load import changed_settings, differences, dump_config, load_config, without_effect
from vtprune_train.config.model import ModelConfig
from vtprune_train.config.pruning import PruningConfig
from vtprune_train.config.settings import Config
from vtprune_train.core.stream import Drop
from vtprune_train.models.io.build import load_model_config
from vtprune_train.pruning import METHODS, method_class, setting_types
from vtprune_train.training.dry_run import describe
from vtprune_train.training.loop.settings import merge_pruning

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def errors_of(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), overrides)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.clipp=1", ["train.clipp: unknown key; did you mean train.clip?"]),
        ("run.sed=1", ["run.sed", "run.seed"]),
        ("prunning.method=none", ["prunning", "pruning"]),
        ("data.train=[{path: a, imags: b}]", ["data.train.0.imags", "data.train.0.images"]),
        ("train.epochs=many", ["train.epochs", "'many'"]),
        ("train.warmup_ratio=2", ["train.warmup_ratio", "less than or equal to 1", "2"]),
        ("pruning.layers=[6, 4, 2]", ["pruning.layers=[6, 4, 2]", "must increase", "[2, 4, 6]"]),
        ("pruning.layers=[2, 4, 60]", ["pruning.layers", "layer 60", "8 layers", "use layers below 8"]),
        ("pruning.layers=[0, 4, 6]", ["pruning.layers", "use 1 or more"]),
        ("pruning.layers=[2, 4]", ["pruning.layers", "2 entries", "3"]),
        ("pruning.keep=[0.1, 0.2, 0.3]", ["pruning.keep", "increases", "[0.3, 0.2, 0.1]"]),
        ("pruning.keep=[1.5, 0.2, 0.1]", ["pruning.keep", "1.5 is not in (0, 1]"]),
        ("pruning.keep=[0.5, 0.2, 0.0]", ["pruning.keep", "0.0 is not in (0, 1]"]),
        ("pruning.method=pyramid", ["pruning", "'pyramid' is unknown", "did you mean pyramiddrop?"]),
        ("pruning.method=3", ["pruning.method: 3 is not the name of a method", "vtprune methods --names"]),
        ("pruning.method_=fastv", ["'method_' is not a setting of pyramiddrop; did you mean method?"]),
        ("pruning.keep=0.5", ["pruning.keep=0.5 is invalid; expected a list such as [0.5]; the default is [0.5, "]),
        ("pruning={method: fastv, keep: [0.5]}", ["pruning.keep=[0.5] is invalid; expected a number; the default"]),
        ("pruning={method: fastv, keep: true}", ["pruning.keep=True is invalid; expected a number"]),
        ("pruning={method: feather, layers: [4]}", ["expected a list of 2 such as [1, 1] or null; the default"]),
        ("pruning={method: voco, hidden_after: query}", ["'hidden_after' is not a setting of voco"]),
        ("pruning.method=[fastv, {method: plphp, keep: 7}]", ["pruning: entry 2 of", "plphp: keep=7 is not in [0, 1]"]),
        (
            "pruning.method=[fastv, {method_: plphp}]",
            ["pruning: entry 2 of the method list", "has no method name; use"],
        ),
        ("pruning.method=[[fastv], plphp]", ["pruning: entry 1 of the method list", "has no method name; use"]),
        ("pruning.method=[none, plphp]", ["pruning: entry 1 of the method list", "has no method name; use"]),
        ("pruning.method=[]", ["list at least one method, or use none for the dense model"]),
        ("pruning.method=[pyramiddrop, lvlm_csp]", ["pruning: pyramiddrop drops tokens before layer 2, but lvlm_csp"]),
        ("pruning.method=[random, {method: fastv, layer: 9}]", ["pruning: fastv: layer=9 does not fit a decoder of 8"]),
        ("train.max_steps=true", ["train.max_steps: true is not a number"]),
        ("model.train.projector=yes", ["model.train: projector: true is not a number"]),
        ("train.betas=[true, 0.9]", ["train.betas: true is not a number"]),
        ("data.max_tokens=100", ["data.max_tokens=100", "data.max_length=256", "raise max_tokens"]),
        ("data.train=[{path: a, take: some}]", ["data.train.0.take", "'some'", "first:N"]),
        ("model.attention=flash", ["model.attention: 'flash' is not", "varlen_sdpa"]),
        ("model.train.projektor=1", ["model.train", "'projektor'", "did you mean projector?"]),
        ("model.train={}", ["model.train", "nothing would be trained"]),
        ("model.path=x", ["model.path and model.config are both set", "from model.path set model.config=null"]),
        (
            "model={path: x, language_model: a, vision_tower: b}",
            [
                "model.path and model.language_model with model.vision_tower are both set",
                "set model.language_model=null model.vision_tower=null",
            ],
        ),
        ("model.config=null", ["model has no source", "model.path"]),
        ("model.dtype=int8", ["model.dtype", "'int8'"]),
        ("nonsense", ["'nonsense' is not key=value"]),
    ],
)
def test_one_wrong_setting(override, words):
    lines = errors_of("quickstart.yaml", override)
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0]


def test_all_errors_at_once():
    lines = errors_of(
        "quickstart.yaml",
        "train.clipp=1",
        "train.epochs=0",
        "data.max_tokens=100",
        "pruning.layers=[2, 4, 60]",
        "model.dtype=int8",
        "data.wokers=3",
    )
    assert len(lines) == 6, lines


def test_overrides_reach_nested_keys_and_lists():
    config = load_config(
        "quickstart.yaml", ["train.clip=0.5", "data.train.0.take=first:3", "model.train.projector=1e-4"]
    )
    assert config.train.clip == 0.5
    assert config.data.train[0].take == "first:3"
    assert config.model.train["projector"] == 1e-4


def test_a_bare_name_is_found_here_first_then_in_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("quickstart.yaml").run.name == "quickstart"
    (tmp_path / "quickstart.yaml").write_text("{run: {name: mine}, model: {path: x}}")
    assert load_config("quickstart.yaml").run.name == "mine"
    with pytest.raises(ConfigError, match=r"quikstart.yaml does not exist; the package has .*configs/quickstart.yaml"):
        load_config("quikstart.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.slow
def test_dry_run_of_every_shipped_config(path, tmp_path):
    """Without weights or network, as a user calls it."""
    command = [sys.executable, str(ROOT / "train.py"), "--config", path.name, "--dry_run"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    for word in ("tokens in each stage", "speed-up", "trainable", "worst micro-batch", "checkpoint"):
        assert word in result.stdout
    assert list(tmp_path.iterdir()) == [], "a dry run leaves nothing behind"


def test_dry_run_of_a_small_model_uses_small_units():
    """The pruning settings are on one line, and a micro-batch has no more samples than a step."""
    small = ["train.global_batch_size=2", "data.max_length=256", "data.max_tokens=4096", "pruning={method: fastv}"]
    report = describe(load_config("quickstart.yaml", small)).splitlines()

    def line(start):
        return next(line for line in report if line.startswith(start))

    assert line("worst micro-batch").startswith("worst micro-batch: 2 sample(s) of data.max_length=256 ")
    assert line("pruning  ").startswith("pruning       fastv ") and "keep=" in line("pruning  ")
    rows = [line(start) for start in ("projector", "language_model", "trainable", "checkpoint")]
    assert len({row.index(".") for row in rows}) == 1, rows
    assert " k parameters" in rows[0] and " k parameters" in rows[1] and " MB: " in rows[3]
    memory = [line for line in report if re.search(r" [MG]iB(?:$|,|:)", line)]
    assert len(memory) > 5 and all(" MiB" in line for line in memory), memory


def test_dry_run_of_the_recipe_counts_what_was_published():
    report = describe(load_config("llava_next_pdrop.yaml"))
    assert "stages of [8, 8, 8, 8] layers" in report
    assert "trainable" in report and "7050.31 M" in report
    row = next(line for line in report.splitlines() if "672 x 672" in line)
    assert "3049 / 1585 / 853 / 487" in row
    dense = describe(load_config("llava_next_dense.yaml"))
    assert "1.00x" in dense


def test_wrong_layers_of_a_known_checkpoint_are_found_without_weights():
    with pytest.raises(ConfigError, match=r"layer 40 does not exist in a decoder of 32"):
        describe(load_config("llava_next_pdrop.yaml", ["pruning.layers=[8,16,40]"]))


def test_deepspeed_keys_that_belong_to_the_run_are_refused():
    config = load_config("quickstart.yaml", ["deepspeed={gradient_clipping: 1.0, zero_optimization: {stage: 1}}"])
    with pytest.raises(ConfigError, match=r"gradient_clipping is set by train.clip; remove it"):
        describe(config)
    with pytest.raises(ConfigError, match=r"zero9.json does not exist"):
        describe(load_config("quickstart.yaml", ["deepspeed=configs/deepspeed/zero9.json"]))


def test_settings_without_effect_are_named():
    config = load_config("quickstart.yaml", ["data.eval=[]", "train.eval_every=5", "pruning.method=none"])
    lines = "\n".join(without_effect(config))
    for key in ("train.eval_every", "train.eval_shuffled", "train.eval_show", "pruning.layers", "pruning.keep"):
        assert f"{key} has no effect" in lines
    assert without_effect(load_config("quickstart.yaml")) == []


def test_defaults_are_not_shared():
    """A list or a section that one run changes is not another's."""

    def parts(section):
        for value in (getattr(section, name) for name in type(section).model_fields):
            if isinstance(value, list | dict | BaseModel):
                yield value
            if isinstance(value, BaseModel):
                yield from parts(value)

    one, two = (Config(model={"path": "x"}, data={"train": [{"path": "y"}]}) for _ in range(2))
    own = {id(part) for part in parts(one)}
    assert len(own) > 8 and not own & {id(part) for part in parts(two)}
    assert not own & {id(field.default) for field in Config.model_fields.values()}
    one.data.train[0].ignore.append("z")
    assert SourceConfig(path="y").ignore == []


def test_typos_in_model_sizes_are_named(tmp_path):
    sizes = {"text_config": {"num_hiden_layers": 4, "vocab_size": 9}}
    with pytest.raises(ValueError, match=r"text_config.num_hiden_layers: unknown .*num_hidden_layers"):
        load_model_config(ModelConfig(config=sizes))
    with pytest.raises(ValueError, match=r"vocab_size is missing"):
        ModelConfig(config={"text_config": {}})


def test_pruning_settings_are_taken_over_unless_set(caplog):
    saved = {"method": "pyramiddrop", "layers": [2, 4], "keep": [0.6, 0.3], "positions": "keep"}
    taken = merge_pruning(PruningConfig(), saved)
    assert (taken.layers, taken.keep, taken.positions) == ([2, 4], [0.6, 0.3], "keep")
    mixed = merge_pruning(PruningConfig(positions="renumber"), saved)
    assert (mixed.layers, mixed.positions) == ([2, 4], "renumber")
    assert "pruning.positions: the checkpoint was trained with keep, this run uses renumber" in caplog.text
    assert merge_pruning(PruningConfig(method="none"), saved).method == "none"
    assert merge_pruning(PruningConfig(), None).method == "none"


def test_keys_of_the_section_are_the_method_s_settings():
    """Whatever the method; those left out are filled in with its defaults, but count as not given."""
    pruning = PruningConfig(positions="keep", keep=[0.6, 0.3, 0.1])
    assert pruning.build() == PyramidDrop(keep=(0.6, 0.3, 0.1), positions="keep")
    assert pruning.settings == pruning.build().settings()
    assert pruning.model_fields_set == {"positions", "keep"}
    dumped = pruning.model_dump()
    assert dumped["layers"] is None and dumped["rank_with"] == "next_layer" and dumped["warmup"] is None
    assert PruningConfig(**dumped).identity() == pruning.identity()
    assert "keep" in PruningConfig(method="none").identity(), "as checkpoints of dense runs have always recorded it"
    for wrong, words in (
        ({"kep": [0.5]}, "'kep' is not a setting of pyramiddrop; did you mean keep?"),
        ({"warmpup": None}, "did you mean warmup?"),
        ({"keep": "half"}, "keep='half'"),
        ({"layers": [1.5]}, "layers=[1.5]"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            PruningConfig(**wrong)


def test_another_method_begins_with_its_own_defaults(caplog):
    """What the file set was for the file's method; what the command line sets is for the new one, in any order."""
    own = f"{__file__}:Every"
    with caplog.at_level("INFO"):
        pruning = load_config("quickstart.yaml", ["pruning.share=0.25", f"pruning.method={own}"]).pruning
    assert pruning.settings == {"method": own, "share": 0.25}
    assert "pruning.layers, keep of the file belong to pyramiddrop" in caplog.text
    same = load_config("quickstart.yaml", ["pruning.method=pyramiddrop", "pruning.full_token_share=0.5"]).pruning
    assert same.layers == [4, 6, 7] and same.full_token_share == 0.5
    lines = errors_of("quickstart.yaml", f"pruning.method={own}", "pruning.keep=[0.5]")
    assert lines == [f"pruning: 'keep' is not a setting of {own}; it has: share, per"]


class Every(PruningMethod):
    """A method of one setting."""

    share: float = 0.5
    name = "every"

    def drops(self, num_layers):
        return (Drop(1, self.share),)

    def score(self, candidates):
        return candidates.hidden.norm(dim=-1)


def test_a_list_is_a_combination(caplog):
    listed = f"pruning.method=[{{method: '{__file__}:Every', share: 0.25}}, pyramiddrop]"
    config = load_config("quickstart.yaml", [listed, "pruning.full_token_share=0.1"])
    method = config.pruning.build()
    assert [drop.layer for drop in method.drops(8)] == [1, 2, 4, 6]
    assert config.pruning.method[1]["keep"] == [0.5, 0.25, 0.125] and config.pruning.full_token_share == 0.1
    assert merge_pruning(PruningConfig(), method.settings()).build() == method
    same = PruningConfig(method=[f"{__file__}:Every", "pyramiddrop"])
    assert merge_pruning(same, same.settings).build() == same.build()
    assert "the checkpoint was trained with" not in caplog.text
    report = describe(config)
    assert "every + pyramiddrop: before layers 1, 2, 4, 6 of 8 it keeps 0.25, 0.5, 0.25, 0.125" in report
    assert schedule(config.pruning.model_dump()).endswith("Every + pyramiddrop 0.5/0.25/0.125 evenly")
    lines = errors_of("quickstart.yaml", "pruning={method: [pyramiddrop, pyramiddrop], keep: [0.5]}")
    assert len(lines) == 1 and "pruning.keep=[0.5] is set next to a list of methods" in lines[0]


def test_one_share_eases_in_too():
    method = PruningConfig(method="random", keep=0.25, warmup={"steps": 4}).phases(8, 0).of(2).method
    assert method.keep == 0.625
    with pytest.raises(ValueError, match=r"warmup.start=0.2 is below keep=0.25"):
        PruningConfig(method="random", keep=0.25, warmup={"steps": 4, "start": 0.2})


def test_published_counts_ease_in_too():
    """SparseVLM has no ``keep`` where its budget says how much stays."""
    method = PruningConfig(method="sparsevlm", warmup={"steps": 4}).phases(8, 0).of(2).method
    assert method.shares == pytest.approx([(1 + kept / 576) / 2 for kept in (300, 200, 110)])
    with pytest.raises(ValueError, match=r"warmup.start=0.5 is below keep=\[0.52"):
        PruningConfig(method="sparsevlm", warmup={"steps": 4, "start": 0.5})
    with pytest.raises(ValueError, match="prumerge has no keep ratios to anneal"):
        PruningConfig(method="prumerge", warmup={"steps": 4})


def test_a_section_of_its_own_file(tmp_path):
    (tmp_path / "found.yaml").write_text("# searched\npruning: {method: pyramiddrop, layers: [3], keep: [0.3]}\n")
    config = load_config("quickstart.yaml", [f"pruning={tmp_path}/found.yaml", "pruning.positions=keep"])
    assert config.pruning.build() == PyramidDrop(layers=(3,), keep=(0.3,), positions="keep")
    (tmp_path / "bare.yaml").write_text("layers: [3]")
    assert "has no section pruning" in errors_of("quickstart.yaml", f"pruning={tmp_path}/bare.yaml")[0]
    assert "nowhere.yaml does not exist" in errors_of("quickstart.yaml", "pruning=nowhere.yaml")[0]


def test_the_dry_run_states_the_resolved_schedule():
    report = describe(load_config("llava_next_pdrop.yaml", ["pruning.layers=null"]))
    assert "pyramiddrop: before layers 8, 16, 24 of 32 it keeps 0.5, 0.25, 0.125" in report
    assert "tokens that enter 0.469" in report


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("qwen2_5_vl_pdrop.yaml", ["pruning.method=visionzip"], "visionzip needs the vision tower's attention, which"),
        ("quickstart.yaml", ["pruning={method: visionzip, layer: 9}"], "visionzip: the vision tower has no layer 9"),
    ],
)
def test_the_dry_run_refuses_what_the_vision_tower_cannot_give(name, overrides, words):
    with pytest.raises(ConfigError, match=f"^pruning: {words}"):
        describe(load_config(name, overrides))


def test_settings_of_the_checkpoint_that_no_longer_fit_are_named():
    with pytest.raises(ConfigError, match="'old' is not a setting of pyramiddrop"):
        merge_pruning(PruningConfig(), {"method": "pyramiddrop", "old": 1})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: PyramidDrop(keep=0.5), r"keep=0.5 is invalid; expected a list such as \[0.5\]; the default is \["),
        (lambda: PyramidDrop(layers=8), r"layers=8 is invalid; expected a list such as \[1\] or null"),
        (lambda: PyramidDrop(layers=(8.5, 16, 24)), r"layers=\(8.5, 16, 24\) is invalid"),
        (lambda: PyramidDrop(keep=("a", 0.5, 0.1)), r"keep=\('a', 0.5, 0.1\) is invalid"),
        (lambda: PyramidDrop(layers=(8, 16)), r"layers=\[8, 16\] has 2 entries but keep=.* has 3; they must"),
        (lambda: PyramidDrop(positions=None), r"positions=None is not one of renumber, keep"),
    ],
)  # fmt: skip
def test_a_method_made_in_python_is_checked_as_one_from_yaml_is(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_method_takes_a_value_of_another_type(name):
    cls = method_class(name)
    for key, kind in setting_types(cls).items():
        wrong = 0.5 if "tuple" in str(kind) else [0.5]
        with pytest.raises(ValueError, match=rf"^{key}=.*(is invalid; expected|is not one of)"):
            cls(**{key: wrong})
    with pytest.raises(TypeError, match=f"{cls.__name__} has no setting 'kep'"):
        cls(kep=0.5)


def test_arrays_ranges_and_lists_are_settings_too():
    assert PyramidDrop(layers=np.array([8, 16, 24]), keep=[0.5, 0.25, 0.125]) == PyramidDrop(layers=range(8, 25, 8))


def test_what_changed_between_two_runs_is_told_key_by_key():
    before = load_config("quickstart.yaml")
    now = load_config(
        "quickstart.yaml",
        [
            "model.train.projector=0.5",
            "train.clip=0.25",
            "data.train.0.weight=2",
            "pruning.keep=[0.9, 0.5, 0.1]",
            "deepspeed={zero_optimization: {stage: 1}}",
            "data.template={user: 'U {text}', assistant: A, answer: ' {text}'}",
        ],
    )
    lines = changed_settings(dump_config(before), dump_config(now))
    rate, stage = before.model.train["projector"], before.deepspeed_config()["zero_optimization"]["stage"]
    for line in (
        f"model.train.projector: {rate} -> 0.5",
        f"train.clip: {before.train.clip} -> 0.25",
        "data.train.0.weight: 1.0 -> 2.0",
        f"pruning.keep: {before.pruning.settings['keep']} -> [0.9, 0.5, 0.1]",
        f"deepspeed.zero_optimization.stage: {stage} -> 1",
    ):
        assert line in lines, lines
    assert [line for line in lines if line.startswith("data.template: ")] and len(lines) < 12
    assert not changed_settings(dump_config(before), dump_config(before))
    older = yaml.safe_load(dump_config(before))
    del older["data"]["max_bad_share"]
    older["deepspeed"] = "configs/deepspeed/zero2.json"
    assert not changed_settings(yaml.safe_dump(older), dump_config(before)), "what an older version did not know"
    assert differences({"a": None}, {"a": 1}) == [("a", "null", "1")]
    assert differences({"a": [{"b": 1}]}, {"a": [{"b": 1}, {"c": 2}]}) == [("a.1", "not set", "{'c': 2}")]
