"""The race of training loops."""

import json

import pytest

import race
from racing.report import COUNTED_BY, rows_of
from racing.setup import Setup


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--steps", "1"), "--steps must be at least 2"),
        (("--repeats", "0"), "--repeats must be at least 1"),
        (("--global_batch", "6"), "--global_batch must be a multiple of --micro_batch"),
        (("--only", "trainer_pack,axolotl"), "unknown row 'axolotl'; rows are trainer_padded"),
        (("--geometry", "7b"), "invalid choice: '7b'"),
    ],
)
def test_refuses(wrong, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        race.main(wrong)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_rows_whose_package_is_missing_are_left_out_with_the_reason(monkeypatch):
    monkeypatch.setitem(race.ROWS, "trl_sft", "a_package_that_nobody_has")
    names, left_out = race.choose(["trainer_pack", "trl_sft"])
    assert names == ["trainer_pack"]
    assert left_out == {"trl_sft": "the package a_package_that_nobody_has is not installed"}


def test_medians_leave_out_the_warm_up_and_the_loop_counts_the_flops():
    setup = Setup(folder="", device="cuda", steps=3, micro_batch=4, global_batch=8)

    def run(seconds, flops=()):
        return {
            "seconds": [100.0, seconds, seconds], "tokens": [500, 100, 300], "flops": list(flops), "peak_flops": 1e3,
            "peak_memory_bytes": int(seconds), "losses": [3.0, 2.0, 1.0], "settings": {}, "load_average": 0.0,
        }  # fmt: skip

    runs = {"trainer_pack": [run(4), run(2), run(8)], "loop_dense": [run(1, (9, 800, 1200))]}
    padded, loop = rows_of(runs, setup)
    assert (padded["samples_per_second"], padded["tokens_per_second"], padded["peak_memory_bytes"]) == (2, 50, 8)
    assert COUNTED_BY["trainer_pack"] == "loop_dense"
    assert (padded["mfu"], loop["mfu"]) == (0.25, 1.0)
    assert rows_of({"trainer_pack": runs["trainer_pack"]}, setup)[0]["mfu"] is None
    [by_length] = rows_of({"trainer_length_grouped": [run(4)]}, setup)
    assert by_length["samples_per_second"] == 24 / 108, "the longest samples, in the first step, count too"


@pytest.mark.slow
def test_a_race_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(race.ROWS, "ms_swift", "a_package_that_nobody_has")
    rows = "trainer_padded,ms_swift,trainer_pack,trainer_prune,loop_prune"
    files = ["--json", str(tmp_path / "new" / "race.json"), "--plot", str(tmp_path / "race.png")]
    assert race.main(["--geometry", "tiny", "--steps", "2", "--repeats", "1", "--only", rows, *files]) == 0
    report = json.loads((tmp_path / "new" / "race.json").read_text())
    by_name = {row["name"]: row for row in report["rows"]}
    assert list(by_name) == ["trainer_padded", "trainer_pack", "trainer_prune", "loop_prune"]
    for row in by_name.values():
        assert min(row["samples_per_second"], row["tokens_per_second"], row["peak_memory_bytes"]) > 0
        assert len(row["losses"]) == len(row["step_seconds"][0]) == 2 and row["settings"] and row["mfu"] is None
    losses = {name: row["losses"] for name, row in by_name.items()}
    assert losses["trainer_pack"] == pytest.approx(losses["trainer_padded"], abs=1e-4)
    assert losses["loop_prune"] == pytest.approx(losses["trainer_prune"], abs=1e-4), "same samples, same drops"
    assert losses["trainer_prune"] != pytest.approx(losses["trainer_pack"], abs=1e-4), "something is dropped"
    assert report["left_out"] == {"ms_swift": "the package a_package_that_nobody_has is not installed"}
    assert (report["geometry"], report["steps"], len(report["sample_tokens"])) == ("tiny", 2, 16)
    assert "ms_swift: left out" in capsys.readouterr().out
    assert (tmp_path / "race.png").stat().st_size > 10_000
