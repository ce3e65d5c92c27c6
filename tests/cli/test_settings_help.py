"""``--help KEY`` of the commands that train."""

import subprocess
import sys

import pytest

from tests.support.runner import ROOT
from vtprune_train import PyramidDrop
from vtprune_train.cli import main, train_main
from vtprune_train.config.pruning import PruningConfig
from vtprune_train.config.reference import method_settings
from vtprune_train.config.settings import Config


def help_of(capsys, *arguments, command=main, code=0):
    with pytest.raises(SystemExit) as caught:
        command(list(arguments))
    assert caught.value.code == code
    printed = capsys.readouterr()
    return printed.err if code else printed.out


TRAIN = (("train",), ("launch",), ("launch", "--nproc_per_node", "2", "--config", "quickstart.yaml"))


@pytest.mark.parametrize("command", TRAIN, ids=" ".join)
def test_one_setting(capsys, command):
    text = help_of(capsys, *command, "--help", "train.clip")
    assert text.startswith("train.clip\n  Maximum gradient norm; larger gradients are scaled down. 0: no clipping.\n")
    assert "type     number >= 0\n  default  0.0" in text


def test_train_py_takes_it_too(capsys):
    assert help_of(capsys, "--help", "data.train.0.take", command=train_main).startswith("data.train.N.take\n")
    assert "default  all" in help_of(capsys, "-h", "data.train.N.take", command=train_main)


@pytest.mark.parametrize("command", [("train",), ("launch",)], ids=" ".join)
def test_help_alone_shows_options_sections_and_recipes(capsys, command):
    text = help_of(capsys, *command, "--help")
    for word in (
        "usage: vtprune",
        "--help KEY",
        *(f"\n  {section} " for section in Config.model_fields),
        "quickstart.yaml",
    ):
        assert word in text, word


def test_a_section_lists_its_keys(capsys):
    text = help_of(capsys, "train", "--help", "pruning")
    for key in PruningConfig.model_fields:
        assert f"\n  pruning.{key}" in text
    assert "`vtprune methods NAME`" in text
    assert "model.peft.r " in help_of(capsys, "train", "--help", "model.peft")


def test_a_setting_of_methods_names_them_with_their_defaults(capsys):
    text = " ".join(help_of(capsys, "train", "--help", "pruning.keep").split())
    assert f"pyramiddrop {method_settings(PyramidDrop)['keep']} (default [0.5, 0.25, 0.125])" in text
    assert " fastv " in text and " voco " not in text


def test_the_last_name_alone_is_enough(capsys):
    assert "train.clip\n" in help_of(capsys, "train", "--help", "clip")
    text = help_of(capsys, "train", "--help", "system")
    assert "data.system\n" in text and "data.train.N.prompt.system\n" in text


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("train.clipp", "unknown key 'train.clipp'; did you mean train.clip?"),
        ("pruning.keeep", "did you mean pruning.keep?"),
        ("max_grad_norm", "use train.clip"),
        ("trian", "did you mean train?"),
    ],
)
def test_an_unknown_key_is_answered_by_the_nearest(capsys, key, words):
    assert words in help_of(capsys, "train", "--help", key, code=2)


@pytest.mark.slow
def test_a_reader_that_ends_early_is_no_error():
    command = f"{sys.executable} -m vtprune_train.cli train --help data | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "data\n" and not done.stderr
