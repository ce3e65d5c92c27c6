"""Settings: every error at once, with key, value and way out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vtprune_train.config import ConfigError, ModelConfig, PruningConfig, load_config, without_effect
from vtprune_train.models.build import load_model_config
from vtprune_train.training.dry_run import describe
from vtprune_train.training.run import merge_pruning

ROOT = Path(__file__).parent.parent
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
        ("pruning.method=pyramid", ["pruning", "'pyramid' is unknown", "pyramiddrop"]),
        ("data.max_tokens=100", ["data.max_tokens=100", "data.max_length=256", "raise max_tokens"]),
        ("data.train=[{path: a, take: some}]", ["data.train.0.take", "'some'", "first:N"]),
        ("model.attention=flash", ["model.attention", "'flash' is unknown", "varlen_sdpa"]),
        ("model.train.projektor=1", ["model.train", "'projektor'", "did you mean projector?"]),
        ("model.train={}", ["model.train", "nothing would be trained"]),
        ("model.path=x", ["model", "path and config are both set"]),
        ("model.config=null", ["model has no origin", "model.path"]),
        ("model.dtype=int8", ["model.dtype", "'int8'"]),
        ("nonsense", ["'nonsense' is no key=value"]),
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
    with pytest.raises(ConfigError, match=r"quikstart.yaml is neither here nor in configs/ \(there: .*quickstart.yaml"):
        load_config("quikstart.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_line_of_a_shipped_config_is_commented(path):
    for line in path.read_text().splitlines():
        key, colon, rest = line.strip().lstrip("- ").partition(":")
        if colon and rest.strip() and not key.startswith("#") and not key.startswith("{"):
            assert "#" in line, line


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_dry_run_of_every_shipped_config(path, tmp_path):
    """Without weights or network, as a user calls it."""
    command = [sys.executable, str(ROOT / "train.py"), "--config", path.name, "--dry_run"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    for word in ("tokens in each stage", "speed-up", "trainable", "worst micro-batch", "checkpoint"):
        assert word in result.stdout
    assert list(tmp_path.iterdir()) == [], "a dry run leaves nothing behind"


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
    with pytest.raises(ConfigError, match=r"gradient_clipping is decided by train.clip"):
        describe(config)
    with pytest.raises(ConfigError, match=r"zero9.json is neither here"):
        describe(load_config("quickstart.yaml", ["deepspeed=configs/deepspeed/zero9.json"]))


def test_settings_without_effect_are_named():
    config = load_config("quickstart.yaml", ["data.eval=[]", "train.eval_every=5", "pruning.method=none"])
    lines = "\n".join(without_effect(config))
    for key in ("train.eval_every", "train.eval_shuffled", "train.eval_show", "pruning.layers", "pruning.keep"):
        assert f"{key} has no effect" in lines
    assert without_effect(load_config("quickstart.yaml")) == []


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
