"""A run begun by version 0.1.0 (the files of ``tests/fixtures/version_0_1_0``) resumes and exports.

Each fixture is a run of two ranks on ``Runs``' data that was stopped after step 3, with the ``metrics.jsonl`` and the
final weights of the same run when it was left alone.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.runner import ROOT, Runs
from vtprune_train.cli import main

pytestmark = pytest.mark.slow

FIXTURES = ROOT / "tests" / "fixtures" / "version_0_1_0"
SMALL = [
    "model.config.text_config.hidden_size=16",
    "model.config.text_config.intermediate_size=24",
    "model.config.text_config.vocab_size=320",
    "model.config.vision_config.hidden_size=16",
    "model.config.vision_config.intermediate_size=16",
]
RUNS = {"zero2": ("float32", 1e-5), "zero3": ("bfloat16", 2e-2)}  # how far CPUs with other instructions may differ


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("older"))


def copy(runs: Runs, stage: str) -> Path:
    """The run as it stood after step 3."""
    folder = runs.directory(stage)
    shutil.copytree(FIXTURES / stage, folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:3]))
    return folder


@pytest.mark.parametrize("stage", RUNS)
def test_a_run_of_an_older_version_resumes(runs, stage):
    dtype, tolerance = RUNS[stage]
    folder = copy(runs, stage)
    settings = [*SMALL, f"deepspeed=configs/deepspeed/{stage}.json", f"model.dtype={dtype}"]
    said = runs.run(stage, *settings, "train.save_every=3", "train.keep_last=9", ranks=2).stderr
    assert "step_00000003" in said
    before = [json.loads(line) for line in (FIXTURES / stage / "metrics.jsonl").read_text().splitlines()]
    now = runs.metrics(stage)
    assert [line["step"] for line in now] == list(range(1, 9)) and now[:3] == before[:3]
    for line, expected in zip(now, before, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=tolerance)
        assert line["supervised_tokens"] == expected["supervised_tokens"]
    finished = load_file(folder / "checkpoints" / "step_00000008" / "hf" / "model.safetensors")
    for name, tensor in load_file(FIXTURES / stage / "finished.safetensors").items():
        torch.testing.assert_close(finished[name], tensor, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("stage", RUNS)
def test_a_checkpoint_of_an_older_version_exports_and_converts(runs, tmp_path, stage):
    """What it holds does not change by a bit."""
    source = FIXTURES / stage / "checkpoints" / "step_00000003"
    assert main(["checkpoint", "verify", str(FIXTURES / stage)]) == 0
    assert main(["export", "--model", str(FIXTURES / stage), "--out", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    exported = load_file(tmp_path / "out" / "model.safetensors")
    saved = load_file(source / "hf" / "model.safetensors")
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[name], tensor.float()) for name, tensor in saved.items())
    assert main(["checkpoint", "convert", str(source), "--out", str(tmp_path / "portable")]) == 0
