"""The race of training loops."""

import json
import sys
from pathlib import Path

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
    monkeypatch.setitem(race.ROWS, "ms_swift", "another_one")
    names, left_out = race.choose(["trainer_pack", "trl_sft", "ms_swift"], Path("/nowhere/python"))
    assert names == ["trainer_pack"]
    assert left_out == {
        "trl_sft": "the package a_package_that_nobody_has is not installed (make ecosystem)",
        "ms_swift": "the package another_one is installed neither here nor in /nowhere/python (make peers)",
    }


def test_packages_are_looked_up_in_the_environment_of_the_peers(monkeypatch):
    monkeypatch.setitem(race.ROWS, "ms_swift", "pytest")
    assert race.has("pytest", None)
    assert race.has("pytest", Path(sys.executable))
    assert not race.has("a_package_that_nobody_has", Path(sys.executable))
    assert race.choose(["ms_swift"]) == (["ms_swift"], {})


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
    batch = ["--global_batch", "2", "--micro_batch", "2"]
    settings = ["--geometry", "tiny", "--steps", "2", "--repeats", "1", *batch, "--only", rows]
    assert race.main([*settings, *files]) == 0
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
    assert list(report["left_out"]) == ["ms_swift"]
    assert (report["geometry"], report["steps"], len(report["sample_tokens"])) == ("tiny", 2, 4)
    assert "ms_swift: left out" in capsys.readouterr().out
    assert (tmp_path / "race.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize(("name", "package"), [("llamafactory", "llamafactory"), ("ms_swift", "swift")])
def test_peers(tmp_path, name, package):
    """In an environment of their own, with an older transformers: the same samples give the same losses."""
    if not race.has(package, race.PEERS):
        pytest.skip(f"{package} is not installed (make peers)")
    rows = f"trainer_padded,{name}"
    settings = ["--geometry", "tiny", "--steps", "2", "--global_batch", "4", "--only", rows]
    assert race.main([*settings, "--json", str(tmp_path / "race.json")]) == 0
    padded, peer = json.loads((tmp_path / "race.json").read_text())["rows"]
    assert peer["name"] == name
    assert peer["losses"] == pytest.approx(padded["losses"], abs=1e-4)
    assert set(peer["settings"]["versions"]) > {"torch", "transformers"}
