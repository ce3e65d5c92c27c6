"""``vtprune quickstart``: it continues what is there, and refuses settings that its table cannot be made with."""

import json
from pathlib import Path

import pytest

from vtprune_train.cli import main, quickstart


@pytest.mark.parametrize(
    "override",
    ["run.name=x", "run.output_dir=elsewhere", "run.stop_after=3", "train.eval_shuffled=false", "data.eval=[]"],
)
@pytest.mark.parametrize("options", [(), ("--compare", "--restart")])
def test_settings_without_a_table_are_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, override, options
):
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", *options, override]) == 2
    assert f"cannot make its table with {override}".lower() in capsys.readouterr().err.lower()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_continues_and_only_restart_deletes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "NUM_TRAIN", 64)
    monkeypatch.setattr(quickstart, "NUM_EVAL", 16)
    metrics, settings = Path("runs/quickstart/metrics.jsonl"), ["train.epochs=1", "train.export=never"]

    def times(*options):
        assert main(["quickstart", *options, "--ranks", "1", *settings]) == 0
        assert "exact match" in capsys.readouterr().out and Path("runs/quickstart/result.json").is_file()
        return [json.loads(line)["time"] for line in metrics.read_text().splitlines()]

    quickstart.write_dataset(quickstart.DATA, num_train=64, num_eval=16, seed=7)
    assert quickstart.start(Path("runs/quickstart"), [*settings, "run.stop_after=1"], 1).wait() == 0
    [first] = [json.loads(line)["time"] for line in metrics.read_text().splitlines()]
    continued = times()
    assert len(continued) == 2 and continued[0] == first
    assert times() == continued, "a finished run stays"
    restarted = times("--restart")
    assert len(restarted) == 2 and not set(restarted) & set(continued)
