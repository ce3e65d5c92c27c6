"""``base:`` in a file of settings."""

import logging

import pytest
import yaml

from vtprune_train.cli import main
from vtprune_train.config.errors import ConfigError
from vtprune_train.config.inherit import merge
from vtprune_train.config.load import dump_config, load_config, without_effect


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write files of settings into the working folder: ``write(name=text)`` is ``name.yaml``."""
    monkeypatch.chdir(tmp_path)

    def write(**files):
        for name, text in files.items():
            (tmp_path / f"{name}.yaml").write_text(text)

    return write


def errors_of(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


def test_a_chain_merges_mappings_and_replaces_everything_else(write):
    write(
        grandparent="{model: {path: x}, data: {train: [{path: a}, {path: b}], workers: 1}, train: {betas: [0.5, 0.6]}}",
        parent="base: grandparent.yaml\ndata: {train: [{path: c}]}\ntrain: {clip: 0.5}",
        child="base: parent.yaml\ntrain: {clip: 1.5, epochs: 3}\nmodel: {peft: {r: 8}, train: {lora: 1.0}}",
    )
    config = load_config("child.yaml", ["train.epochs=4"])
    assert (config.model.path, config.model.peft.r, config.model.train) == ("x", 8, {"lora": 1.0})
    assert [source.path for source in config.data.train] == ["c"] and config.data.workers == 1
    assert (config.train.clip, config.train.epochs, config.train.betas) == (1.5, 4, (0.5, 0.6))


def test_null_in_a_derived_file_freezes_a_part(write):
    write(
        base="{model: {path: x, train: {projector: 1.0, language_model: 2.0}}}",
        derived="{base: base.yaml, model: {train: {projector: 3.0, language_model: null}}}",
    )
    assert load_config("derived.yaml").model.train == {"projector": 3.0}


def test_a_recipe_of_the_package_is_a_base_from_any_folder(write):
    write(mine="base: quickstart.yaml\nrun: {name: mine}")
    mine, recipe = load_config("mine.yaml"), load_config("quickstart.yaml", ["run.name=mine"])
    assert dump_config(mine) == dump_config(recipe)
    assert "base" not in yaml.safe_load(dump_config(mine)), "a run's config.yaml is resolved"


def test_names_are_looked_up_beside_the_file_that_holds_them(write, tmp_path):
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "common.yaml").write_text("{model: {path: x}, data: {train: mixture.yaml}, pruning: searched.yaml}")
    (folder / "mixture.yaml").write_text("[{path: beside}]")
    (folder / "searched.yaml").write_text("pruning: {method: pyramiddrop, layers: [3], keep: [0.5]}")
    (folder / "derived.yaml").write_text("base: common.yaml")
    write(common="{model: {path: other}}", mine="base: recipes/derived.yaml\npruning: {keep: [0.25]}")
    config = load_config("mine.yaml")
    assert config.model.path == "x" and config.data.train[0].path == "beside"
    assert (config.pruning.layers, config.pruning.keep) == ([3], [0.25])


@pytest.mark.parametrize(("data", "code"), [("{max_length: 512}", 0), ("{train: [{path: nowhere.json}]}", 2)])
@pytest.mark.slow
def test_a_dry_run_needs_data_only_if_a_file_of_the_user_names_it(write, capsys, data, code):
    write(mine=f"base: quickstart.yaml\ndata: {data}")
    assert main(["train", "--config", "mine.yaml", "--dry_run"]) == code
    assert ("nowhere.json" in capsys.readouterr().err) == bool(code)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a": "base: a.yaml"}, "a.yaml: base: the bases form a cycle: a.yaml -> {}/a.yaml"),
        (
            {"a": "base: b.yaml", "b": "base: c.yaml", "c": "base: b.yaml"},
            "{0}/c.yaml: base: the bases form a cycle: a.yaml -> {0}/b.yaml -> {0}/c.yaml -> {0}/b.yaml",
        ),
        ({"a": "base: quikstart.yaml"}, "a.yaml: base: quikstart.yaml does not exist; the package has configs/int"),
        ({"a": "base: [b.yaml]"}, "a.yaml: base: ['b.yaml'] is not the name of a file"),
        ({"a": "base: b.yaml", "b": "- 1"}, "{}/b.yaml holds a list, not settings"),
        ({"a": "base: b.yaml", "b": "{"}, "a.yaml: base: {}/b.yaml is not YAML"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_a_wrong_base_is_named(write, tmp_path, files, words):
    write(**files)
    [line] = errors_of("a.yaml")
    assert line.startswith(words.format(tmp_path)), line


def test_an_error_names_the_file_of_the_key(write, tmp_path):
    write(
        base="{model: {path: x}, train: {clipp: 1, epochs: 0}, data: {max_length: 64, train: [{path: a, take: some}]}}",
        derived="{base: base.yaml, train: {save_every: 0}, pruning: {layers: [3, 2, 1]}}",
    )
    lines = errors_of("derived.yaml", "train.keep_last=0")
    where = {line.partition(":")[0].partition("=")[0]: line.rpartition(" (in ")[2] for line in lines}
    base = f"{tmp_path}/base.yaml)"
    assert {key: where[key] for key in ("train.clipp", "train.epochs", "data.train.0.take")} == {
        "train.clipp": base,
        "train.epochs": base,
        "data.train.0.take": base,
    }
    assert where["train.save_every"] == where["pruning.layers"] == "derived.yaml)"
    assert ([line for line in lines if line.startswith("train.keep_last")] and "(in" not in lines[-1]) or len(
        lines
    ) == 6
    [override] = [line for line in lines if line.startswith("train.keep_last")]
    assert "(in" not in override, "the command line set it"


def test_another_method_leaves_the_settings_of_the_base_s(write, caplog):
    write(
        base="{model: {path: x}, pruning: {method: pyramiddrop, layers: [3], keep: [0.5], full_token_share: 0.5}}",
        other="{base: base.yaml, pruning: {method: fastv, keep: 0.25}}",
        dense="{base: base.yaml, pruning: {method: none}}",
        same="{base: base.yaml, pruning: {method: pyramiddrop, keep: [0.75]}}",
    )
    other = load_config("other.yaml").pruning
    assert (other.method, other.keep, other.full_token_share) == ("fastv", 0.25, 0.5) and not hasattr(other, "layers")
    with caplog.at_level(logging.INFO):
        dense = load_config("dense.yaml")
    assert dense.pruning.settings == {"method": "none"} and not dense.pruning.full_token_share
    assert not caplog.text and not [line for line in without_effect(dense) if line.startswith("pruning")]
    same = load_config("same.yaml").pruning
    assert (same.layers, same.keep) == ([3], [0.75])


def test_another_optimizer_leaves_the_arguments_of_the_base_s(write):
    write(
        base="{model: {path: x}, train: {optimizer: a.py:A, optimizer_args: {rho: 1, mu: 2}, clip: 0.5}}",
        other="{base: base.yaml, train: {optimizer: b.py:B, optimizer_args: {nu: null}}}",
        plain="{base: base.yaml, train: {optimizer: adamw}}",
        fewer="{base: base.yaml, train: {optimizer_args: {rho: null, mu: 3}}}",
    )
    names = ("base", "other", "plain", "fewer")
    args = {name: load_config(f"{name}.yaml").train.optimizer_args for name in names}
    assert args == {"base": {"rho": 1, "mu": 2}, "other": {"nu": None}, "plain": {}, "fewer": {"mu": 3}}
    assert load_config("plain.yaml").train.clip == 0.5


def test_a_mapping_for_deepspeed_changes_the_file_of_the_base(write):
    write(
        base="{model: {path: x}, deepspeed: configs/deepspeed/zero3.json}",
        derived="{base: base.yaml, deepspeed: {zero_optimization: {stage3_prefetch_bucket_size: 7}}}",
        broken="{base: missing.yaml, deepspeed: {zero_optimization: {stage: 1}}}",
        missing="{model: {path: x}, deepspeed: missing.json}",
    )
    command_line = load_config("base.yaml", ["deepspeed.zero_optimization.stage3_prefetch_bucket_size=7"])
    assert load_config("derived.yaml").deepspeed_config() == command_line.deepspeed_config()
    assert command_line.deepspeed_config()["zero_optimization"]["stage"] == 3
    assert errors_of("broken.yaml")[0].startswith("deepspeed: missing.json does not exist")


def test_a_file_may_extend_the_recipe_of_its_name(write):
    write(quickstart="base: quickstart.yaml\ntrain: {epochs: 9}", mine="base: quickstart.yaml\ntrain: {clip: 0.5}")
    config = load_config("mine.yaml")
    assert (config.train.epochs, config.train.clip, config.model.config["text_config"]["hidden_size"]) == (9, 0.5, 64)


def test_merge_leaves_its_arguments():
    base, tree = {"a": {"b": 1, "c": [1]}}, {"a": {"c": [2]}, "d": None}
    assert merge(base, tree) == {"a": {"b": 1, "c": [2]}, "d": None}
    assert base == {"a": {"b": 1, "c": [1]}}
