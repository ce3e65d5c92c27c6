"""What a new user gets wrong: each message names the value, its place and how to mend it; none is a traceback."""

import json
import os
import re

import pytest
import yaml

from tests.support.runner import TINY, Runs
from vtprune_train.cli import main, train_main
from vtprune_train.config.errors import ConfigError
from vtprune_train.config.load import load_config
from vtprune_train.config.pruning import PruningConfig
from vtprune_train.config.settings import Config
from vtprune_train.files.parse import read_yaml
from vtprune_train.training.check_data import check_run_dir
from vtprune_train.training.checkpoint.resume import _check_identity
from vtprune_train.training.engine.settings import engine_config
from vtprune_train.training.loop.data import cache_dir
from vtprune_train.training.loop.run import warn_of_batch


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a configuration, and with files that are broken in one way each."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "data": {**TINY["data"], "train": [], "eval": []}}))
    (tmp_path / "twice.yaml").write_text("train: {clip: 1}\nmodel: {path: x}\ntrain:\n  clip: 2\n")
    (tmp_path / "open.yaml").write_text("model: {path: x\nrun:\n  name: y\n")
    (tmp_path / "tab.yaml").write_text("run:\n\tname: x\n")
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: na\xefve}")
    (tmp_path / "ds.json").write_text('{\n  "zero_optimization": {"stage": 2,}\n}')
    (tmp_path / "latin.json").write_bytes(b'{"x": "\xe9"}')
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.json").write_text('[\n {"id": 1,\n  "é": nul}\n]', encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n{"id": 2, "x": }\n')
    (tmp_path / "lines.json").write_text('{"id": 1}\n{"id": 2}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


SETTINGS = [
    ("epochs=3", "epochs: unknown key; did you mean train.epochs?"),
    ("seed=3", "seed: unknown key; did you mean run.seed?"),
    ("train.seed=3", "train.seed: unknown key; did you mean run.seed?"),
    ("train.max_length=3", "did you mean data.max_length?"),
    ("name=x", "did you mean run.name?"),
    ("data.train=[{path: a.json, images: b, video: c}]", "video: unknown key; did you mean data.train.0.videos?"),
    ("data.video={num_frames: 4, max_frames: 8}", "max_frames=8 is a limit of sampling by fps and has no effect with"),
    ("data.video={num_frames: 4, fps: 1}", "fps=1 and num_frames=4 exclude each other; set one to null"),
    ("path=x", "did you mean model.path?"),
    ("learning_rate=1e-4", "learning_rate: unknown key; use a rate for each trained part: model.train="),
    ("train.lr=1e-4", "train.lr: unknown key; use a rate for each trained part"),
    ("per_device_train_batch_size=8", "use data.max_tokens"),
    ("num_train_epochs=1", "use train.epochs"),
    ("train=3", "train: it takes keys, not a single value; known: global_batch_size, epochs"),
    ("data.train=[train.json]", "data.train.0: it takes keys, not a single value; known: path, images"),
    ("data.train=train.json", "data.train: train.json is a data file, not a mixture; write [{path: train.json}], or"),
    ("data.train={path: train.json}", "data.train: Input should be a valid list; write it in brackets, [...], or as"),
    ("model.train=[projector]", "model.train: it takes keys, not a single value (it is ['projector'])"),
    ("pruning=fastv", "pruning: fastv is not a file; to choose a method, set pruning.method=fastv"),
    ("run.name=2024", "run.name: Input should be a valid string; quote the string: 'run.name=\"2024\"' (it is 2024)"),
    ("data.system=no", "data.system: Input should be a valid string; quote the string: 'data.system=\"...\"' (it is "),
    ("data.system=<image>", "data.system: '<image>' contains <image>, but a prompt has no image"),
    ("model.train.projector=.inf", "model.train: projector: the learning rate inf is not positive and finite"),
    ("run.name=a: b", "run.name: Input should be a valid string (it is {'a': 'b'})"),
    ("data.root=@x", "data.root: '@x' is not YAML: while scanning"),
    ("data.root=@x", "quote it: 'data.root=\"@x\"'"),
    ("train={clip: 1, clip: 2}", "train: '{clip: 1, clip: 2}' is not YAML: duplicate key 'clip' (line 1, column 11)"),
    ("deepspeed=ds.json", "deepspeed: ds.json is not JSON: Expecting property name enclosed in double quotes (line 2,"),
    ("deepspeed=latin.json", "latin.json is not JSON: it is not UTF-8 text (invalid continuation byte at byte 7)"),
    ("deepspeed=configs/deepspeed/zero9.json", "configs/deepspeed/zero3_offload.json; did you mean configs/deepspeed/"),
    ("deepspeed={zero_optimisation: {stage: 2}}", "deepspeed.zero_optimisation: unknown key; did you mean zero_optimi"),
    ("deepspeed={zero_optimization: 2}", "deepspeed.zero_optimization=2: must be a mapping, for example {stage: 2}"),
    ("data.template=vicuna", "data.template='vicuna' is unknown; known: plain, vicuna_v1"),
    ("model.config.text_config.num_attention_heads=3", "model.config: transformers refuses these sizes: The hidden si"),
    ("run.output_dir=file", "run.output_dir: file/run cannot be written (file is a file); choose a writable folder"),
    ("run.output_dir=file/x/y", "run.output_dir: file/x/y/run cannot be written (file is a file)"),
    ("run.output_dir=dangling", "run.output_dir: dangling/run cannot be written (dangling is a link to nowhere, which"),
    ("data.train=[{path: bad.json}]", "bad.json: not JSON (Expecting value, at byte 21: line 3, column 9)"),
    ("data.train=[{path: bad.jsonl}]", "bad.jsonl, line 2: not JSON (Expecting value, column 16)"),
    ("data.train=[{path: lines.json}]", "lines.json contains a dict, not a list of conversations; if each line"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "words"), SETTINGS, ids=lambda value: value[:40])
def test_a_wrong_setting_is_refused_by_a_dry_run(folder, capsys, override, words):
    assert train_main(["--config", "tiny.yaml", "--dry_run", override]) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said, said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tinny.yaml", "--config: tinny.yaml does not exist; the package has configs/internvl_pdrop.yaml, "),
        ("tinny.yaml", "configs/qwen3_5_pdrop.yaml, configs/qwen3_vl_pdrop.yaml; did you mean tiny.yaml?"),
        ("tiny.yml", "did you mean tiny.yaml?"),
        ("lava_next_pdrop.yaml", "did you mean configs/llava_next_pdrop.yaml?"),
        ("configs/quikstart.yaml", "did you mean configs/quickstart.yaml?"),
        ("folder", "--config: folder is a folder; name a file in it"),
        ("twice.yaml", "--config: twice.yaml is not YAML: duplicate key 'train' (line 3, column 1)"),
        ("open.yaml", "open.yaml is not YAML: while parsing a flow mapping: expected ',' or '}', but got ':' (line 2,"),
        ("tab.yaml", "tab.yaml is not YAML: while scanning for the next token: found character '\\t' that cannot star"),
        ("latin.yaml", "latin.yaml is not YAML: it is not UTF-8 text (invalid continuation byte at byte 14)"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_named(folder, capsys, name, words):
    assert train_main(["--config", name, "--dry_run"]) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said, said


def test_yaml_that_takes_over_keys_of_another_mapping(folder):
    text = "a: &a {clip: 1, epochs: 2}\nb: &b\n  <<: *a\n  clip: 3\nc:\n  <<: *b\n  epochs: 4\n"
    (folder / "merged.yaml").write_text(text)
    assert read_yaml(folder / "merged.yaml")["c"] == {"clip": 3, "epochs": 4}


def test_a_key_of_a_named_deepspeed_file_is_changed_alone(folder, capsys):
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2, "overlap_comm": False}}))
    config = load_config("tiny.yaml", ["deepspeed=ds.json", "deepspeed.zero_optimization.stage=1"])
    assert config.deepspeed == {"zero_optimization": {"stage": 1, "overlap_comm": False}}
    assert train_main(["--config", "tiny.yaml", "deepspeed=ds.jsn", "deepspeed.zero_optimization.stage=1"]) == 2
    assert "deepspeed: ds.jsn does not exist; the package has" in capsys.readouterr().err


def test_a_setting_written_as_an_option(folder, capsys):
    for command in (train_main, lambda given: main(["train", *given])):
        with pytest.raises(SystemExit):
            command(["--config", "tiny.yaml", "--epochs", "3"])
        assert "settings are key=value without dashes, for example train.epochs=3" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            command(["--config", "tiny.yaml", "--lr", "1e-3"])
        assert "(lr: use a rate for each trained part: model.train=" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            command(["quickstart.yaml"])
        assert "required: --config; name your YAML file, or one of internvl_pdrop" in capsys.readouterr().err


def test_a_file_that_a_command_cannot_write_is_named(folder, capsys):
    (folder / "eval.json").write_text(json.dumps([]))
    assert main(["methods", "--names"]) == 0
    assert main(["convert", "--model", "file", "--to", "hf", "--out", "file/x"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(folder):
    (folder / "folder").chmod(0o500)
    with pytest.raises(ConfigError, match=r"run.output_dir: .*folder/run cannot be written \(Permission denied\)"):
        check_run_dir(folder / "folder" / "run")


def test_a_cache_that_cannot_be_written(folder):
    config = Config.model_validate({**TINY, "data": {**TINY["data"], "cache_dir": str(folder / "file" / "x")}})
    with pytest.raises(ConfigError, match=r"data.cache_dir: .*file/x cannot be written \(.*file is a file\)"):
        cache_dir(config)


def test_a_batch_larger_than_the_data(caplog):
    warn_of_batch(20, 20)
    assert not caplog.text
    warn_of_batch(128, 20)
    assert "train.global_batch_size=128 is larger than an epoch of 20 sample(s), so every step" in caplog.text


def test_what_only_a_start_can_tell(tmp_path):
    """The device, and a folder that the system alone knows to refuse."""
    runs = Runs(tmp_path, num_train=3)
    for setting, words in (
        ("model.dtype=float16", r"float16 is not supported on this CPU; use model.dtype=(bfloat16 or )?float32"),
        ("run.output_dir=/proc/none", r"run.output_dir: /proc/none/refused cannot be written \(No such file"),
        ("deepspeed={zero_optimization: {stage: 7}}", r"deepspeed.zero_optimization.stage: .*0, 1, 2.* \(got 7\)"),
        ("deepspeed={zero_optimization: {stge: 2}}", r"deepspeed.zero_optimization.stge: .*not permitted"),
    ):
        done = runs.run("refused", setting, expect=2)
        assert re.search(words, done.stderr) and "Traceback" not in done.stderr, done.stderr
    done = runs.run("big", "train.global_batch_size=50", "train.epochs=1", "data.eval=[]")
    assert "train.global_batch_size=50 is larger than an epoch of 3 sample(s)" in done.stderr
    assert "nothing to train" not in done.stderr
    done = runs.run("big", "train.global_batch_size=50", "train.epochs=1", "data.eval=[]")
    assert "nothing to train: run.name=big has a checkpoint of step 1, and the settings end at step 1" in done.stderr


def test_every_shipped_deepspeed_file_is_taken():
    for name in ("zero0", "zero1", "zero2", "zero3", "zero3_offload"):
        config = Config.model_validate({**TINY, "deepspeed": f"configs/deepspeed/{name}.json"})
        assert engine_config(config)["gradient_clipping"] == config.train.clip


def test_a_run_from_before_a_setting_existed_resumes_with_what_it_did(tmp_path):
    then = PruningConfig(method="voco", tokens=1, hide="image").identity()
    saved = {key: value for key, value in then.items() if key != "hide"}
    (tmp_path / "trainer.json").write_text(json.dumps({"identity": {"pruning": saved}}))
    _check_identity(tmp_path, {"pruning": then})
    with pytest.raises(ValueError, match=r"pruning\.hide: checkpoint 'image', now 'all_before'"):
        _check_identity(tmp_path, {"pruning": PruningConfig(method="voco", tokens=1).identity()})


def test_another_method_is_listed_without_the_settings_that_follow_from_it(tmp_path):
    saved = {"run.seed": 1, "pruning": PruningConfig(method="fastv").identity()}
    (tmp_path / "trainer.json").write_text(json.dumps({"identity": saved}))
    with pytest.raises(ValueError, match="would change what its steps compute") as caught:
        _check_identity(tmp_path, {"run.seed": None, "pruning": PruningConfig(method="voco").identity()})
    assert str(caught.value).splitlines()[1:-1] == [
        "  run.seed: checkpoint 1, now null",
        "  pruning.method: checkpoint 'fastv', now 'voco'",
    ]


def test_the_file_of_a_reader_may_move(tmp_path):
    def identity(reader):
        return {"data.train": [{"path": "a.csv", "reader": reader}, {"path": "b.json"}]}

    (tmp_path / "trainer.json").write_text(json.dumps({"identity": identity("a.py:Pairs")}))
    _check_identity(tmp_path, identity("readers/b.py:Pairs"))
    with pytest.raises(ValueError, match=r"data\.train\.0\.reader: checkpoint 'Pairs', now 'Others'"):
        _check_identity(tmp_path, identity("a.py:Others"))


def test_a_run_from_before_a_setting_was_recorded_is_warned_of(tmp_path, caplog):
    (tmp_path / "trainer.json").write_text(json.dumps({"identity": {"run.seed": 1}}))
    _check_identity(tmp_path, {"run.seed": 1, "data.tokenization": "processor"})
    assert "by an older version without data.tokenization" in caplog.text
    with pytest.raises(ValueError, match=r"run\.seed: checkpoint 1, now 2"):
        _check_identity(tmp_path, {"run.seed": 2, "data.tokenization": "processor"})
