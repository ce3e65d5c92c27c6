"""The script that watches a long run for leaks: a short run of it, and what it calls growth."""

import csv
import sys

import pytest

from tests.support.runner import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import leaks

pytestmark = pytest.mark.slow

MIB = 2**20


def samples(resident, descriptors=lambda step: 40, steps=1000):
    """Of one rank and one worker of an evaluation, every ten steps."""
    made = []
    for step in range(10, steps + 10, 10):
        numbers = dict.fromkeys(leaks.Sample.__dataclass_fields__, 0)
        numbers |= {"step": step, "moment": step / 10, "process": "rank 0"}
        made.append(leaks.Sample(**numbers | {"rss": resident(step), "descriptors": descriptors(step)}))
        if step == 500:
            made.append(leaks.Sample(**numbers | {"process": "rank 0 worker 7", "rss": 900 * MIB}))
    return made


def growing(made):
    return {(trend.process, trend.quantity) for trend in leaks.trends_of(made) if trend.grows}


def test_growth_is_seen_and_noise_is_not():
    assert growing(samples(lambda step: 500 * MIB + (step % 30) * MIB // 10)) == set()
    assert growing(samples(lambda step: 500 * MIB + step * 20_000)) == {("rank 0", "rss")}, "20 kB a step"
    assert growing(samples(lambda step: 500 * MIB, lambda step: 40 + step // 200)) == {("rank 0", "descriptors")}
    assert growing(samples(lambda step: (300 if step < 100 else 500) * MIB)) == set(), "it only warms up"


def test_slopes():
    made = samples(lambda step: 500 * MIB + step * 20_000)
    [trend] = [trend for trend in leaks.trends_of(made) if trend[:2] == ("rank 0", "rss")]
    assert round(trend.per_1000_steps) == 20_000_000
    assert [line for line in leaks.table([trend]) if line.startswith("| rank 0 | 505.6 → 517.1 (+19.07, grows) |")]
    assert {trend.process for trend in leaks.trends_of(made)} == {"whole run", "rank 0"}


@pytest.mark.parametrize(
    "wrong", [("--steps", "0"), ("--ranks", "0"), ("--workers", "-1"), ("--interval", "0"), ("--out", ".")]
)
def test_refuses(wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        leaks.main(["--out", "new", *wrong])
    assert stopped.value.code == 2 and wrong[0] in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_a_real_run(tmp_path, capsys):
    out = tmp_path / "leaks"
    settings = ["--steps", "40", "--ranks", "1", "--workers", "1", "--interval", "0.1"]
    code = leaks.main([*settings, "--out", str(out)])
    said = capsys.readouterr().out
    assert code == int("grows: " in said), "so short a run may still be warming up"
    with (out / "samples.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["process"].partition(" worker")[0] for row in rows} == {"launcher", "rank 0", "rank 0 server"}
    assert any("worker" in row["process"] for row in rows)
    assert all(int(row["rss"]) > 50 * MIB and int(row["descriptors"]) > 3 for row in rows if int(row["step"]) < 40)
    assert "40 steps, 1 rank(s), 1 workers each: " in (out / "leaks.md").read_text()
    assert (out / "leaks.png").stat().st_size > 10_000
