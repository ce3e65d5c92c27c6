"""``scripts/bench_rollout.py``: one prefill for the completions of a prompt."""

import json
import sys

import bench_rollout
from vtprune_train.models.forward import padded


def test_report(tmp_path, monkeypatch, capsys):
    rows = []
    segments = padded._segments

    def spy(*args):
        made = segments(*args)
        rows.append(len(made))
        return made

    monkeypatch.setattr(padded, "_segments", spy)
    options = ("--device", "cpu", "--geometry", "tiny", "--completions", "3", "--steps", "2", "--repeats", "1")
    monkeypatch.setattr(sys, "argv", ["bench_rollout.py", *options, "--json", str(tmp_path / "rollout.json")])
    bench_rollout.main()
    # A warm-up and a repeat of two models, on equal and on different rows, for 1 and for 2 tokens.
    assert rows == [1, 1, 3, 3] * 4
    report = json.loads((tmp_path / "rollout.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["transformers", "packed", "pyramiddrop"]
    for row in report["rows"]:
        assert row["first_token_ratio"] == row["first_token_equal_s"] / row["first_token_different_s"] > 0
    assert "3 completions of a prompt" in capsys.readouterr().out
