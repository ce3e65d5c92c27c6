"""The video suite of ``scripts/bench.py``."""

import json
import sys

import pytest
import torch

import bench
import bench_video

CPU = torch.device("cpu")


def test_rows_compute_the_same_loss_and_count_every_token():
    """Padded transformers and packed dense are the same model on the same samples."""
    geometry = bench_video.GEOMETRIES["tiny"]
    model = bench_video.build(geometry, CPU)
    samples = bench_video.VideoSamples.of(geometry, model.config)
    # 3 steps in time of 2 x 3 and of 2 x 2 merged patches.
    assert [segment.length for segment in samples.segments] == [30 + 18, 12 + 12]
    rows = {row.name: row for row in bench_video.make_rows(model, samples, CPU)}
    with torch.no_grad():
        padded = rows["hf_padded"].run()
        packed = bench.prune(model, None) and rows["dense"].run()
    assert packed == pytest.approx(padded.item(), rel=1e-5)
    assert rows["pyramiddrop"].flops < rows["dense"].flops < rows["hf_padded"].flops


def test_report(tmp_path, monkeypatch, capsys):
    options = ("--suite", "video", "--geometry", "tiny", "--repeats", "1")
    monkeypatch.setattr(sys, "argv", ["bench.py", *options, "--json", str(tmp_path / "video.json")])
    assert bench.main() == 0
    report = json.loads((tmp_path / "video.json").read_text())
    assert report["frames"] == 6 and {"hf_padded", "dense", "pyramiddrop"} <= {row["name"] for row in report["rows"]}
    assert all(row["median_s"] > 0 for row in report["rows"])
    assert set(report["ratios"]["pyramiddrop"]) == {"time", "flops", "time_over_flops", "time_over_hf_padded"}
    assert "pyramiddrop: time" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["bench.py", "--suite", "video", "--geometry", "7b"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "--suite video has the geometries tiny, small" in capsys.readouterr().err
