"""``vtprune quickstart``: it continues what is there, and refuses settings that its table cannot be made with."""

import json
from pathlib import Path

import pytest

from vtprune_train.cli import main, quickstart


@pytest.mark.parametrize(
    "override",
    ["run.name=x", "run.output_dir=elsewhere", "run.stop_after=3", "train.eval_shuffled=false", "data.eval=[]"],
)
@pytest.mark.parametrize("options", [(), ("--compare", "--restart"), ("--video",), ("--text",)])
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


@pytest.mark.slow
def test_videos_are_compared_with_dense_training(tmp_path, monkeypatch, capsys):
    """Each side trains on the whole videos; PyramidDrop does it with fewer FLOPs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "NUM_TRAIN", 64)
    monkeypatch.setattr(quickstart, "NUM_EVAL", 16)
    assert main(["quickstart", "--video", "--compare", "train.epochs=1", "train.export=never"]) == 0
    table = capsys.readouterr().out.split("tokens per sample, by stage")[1]
    assert all(name in table for name in ("dense", "pyramiddrop", "FLOP ratio"))
    result = json.loads(Path("runs/compare_video/result.json").read_text())
    frames, tokens_per_frame = 6, 16
    [dense], dropped = result["dense"]["tokens_per_stage"], result["pyramiddrop"]["tokens_per_stage"]
    assert dense == dropped[0] > frames * tokens_per_frame
    assert dense - dropped[1] == frames * tokens_per_frame / 2
    assert result["flop_ratio"] < 0.9
    assert result["dense"]["steps"] == result["pyramiddrop"]["steps"] == 2
    assert not list(Path("runs/data").glob("quickstart/*"))
