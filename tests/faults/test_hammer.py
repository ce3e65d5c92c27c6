"""The hammer: a few trials of it, and that it notices what is lost."""

import json
import sys

import pytest

from tests.support.runner import ROOT, Runs

sys.path.insert(0, str(ROOT / "scripts"))

import hammer
from hammering import damage
from hammering.plans import STEPS, Choices, Fault, Settings, Trial, draw
from hammering.trial import Failed, References, Run, compare, finish, run_trial

pytestmark = pytest.mark.slow

SETTINGS = Settings(ranks=1, zero=2, background=True, workers=1, evaluate=True, save_every=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("hammer"))


@pytest.fixture(scope="module")
def references(runs):
    made = References(runs, runs.folder / "references")
    made.make(SETTINGS)
    return made


FAULTS = {
    "killed": [Fault("kill", "kill", "before_rename", offset=3), Fault("kill", "kill_worker", "in_backward")],
    "stopped": [Fault("stop", "stop_after", "a step", offset=3), Fault("stop", "sigterm", "after_metrics")],
    "full": [Fault("disk", "fill", "in_shard", offset=3)],
    "damaged": [
        Fault("damage", "flip", "checkpoint", pick=0.7),
        Fault("damage", "flip", "tokenizer", pick=0.5),
        Fault("damage", "remove", "latest"),
    ],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_a_trial_ends_with_the_same_bits(runs, references, tmp_path, faults):
    result = run_trial(runs, Trial(0, SETTINGS, tuple(faults)), tmp_path / "trial", references)
    assert result.outcome == "equal", result.reason
    assert not result.missed and not list(tmp_path.iterdir())


def test_what_is_lost_is_noticed(runs, references, tmp_path):
    run = Run(runs, tmp_path / "trial", SETTINGS)
    run.folder.mkdir()
    finish(run)
    whole = references(SETTINGS)
    compare(run, whole)
    metrics = run.run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:3] + lines[4:]))
    with pytest.raises(Failed, match=r"metrics.jsonl holds the steps \[1, 2, 3, 5"):
        compare(run, whole)
    other = {**json.loads(lines[3]), "loss": 1.0}
    metrics.write_text("".join([*lines[:3], json.dumps(other) + "\n", *lines[4:]]))
    with pytest.raises(Failed, match=r"metrics.jsonl differs"):
        compare(run, whole)
    metrics.write_text("".join(lines))
    (run.cache / "index-0.building").mkdir()
    with pytest.raises(Failed, match=r"left over: cache/index-0.building"):
        compare(run, whole)
    (run.cache / "index-0.building").rmdir()
    damage.apply("flip", "checkpoint", 0.5, run.run_dir, run.cache, run.checkpoints()[-1])
    with pytest.raises(Failed, match="the last checkpoint is damaged"):
        compare(run, whole)


def test_a_run_that_ends_elsewhere_is_noticed(runs, references, tmp_path):
    """Whole in itself, with other numbers: it was trained by another rate in its last steps."""
    run = Run(runs, tmp_path / "trial", SETTINGS)
    run.folder.mkdir()
    assert run.start(f"run.stop_after={STEPS - 1}").code == 0
    assert run.start("model.train.projector=0.02").code == 0
    with pytest.raises(Failed, match="the last checkpoint differs: "):
        compare(run, references(SETTINGS))


def test_trials_follow_from_the_seed():
    trials = [draw(Choices(seed=5), number) for number in range(300)]
    assert trials[37] == draw(Choices(seed=5), 37) != draw(Choices(seed=6), 37)
    faults = [fault for trial in trials for fault in trial.faults]
    assert {fault.kind for fault in faults} == {"kill", "stop", "disk", "damage"}
    assert {(trial.settings.ranks, trial.settings.zero) for trial in trials} == {
        (r, z) for r in (1, 2) for z in (0, 2, 3)
    }
    assert all(trial.settings.ranks == 2 for trial in trials for fault in trial.faults if fault.what == "kill_launcher")


def test_command(tmp_path, capsys):
    """A trial on two ranks and a table; the command that repeats a trial names what it was drawn from."""
    drawn_from = ["--seed", "3", "--ranks", "2", "--zero", "3", "--kinds", "kill"]
    assert hammer.main([*drawn_from, "--only", "0", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "| moment | kill |" in said and "1 trials, 1 faults" in said and "1 equal, 0 refused, 0 failed" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"hammer.md", "references", "data", "tiny.yaml"}
    again = hammer.repeat(hammer.parse(drawn_from), 7)
    assert again == "python scripts/hammer.py --seed 3 --only 7 --ranks 2 --zero 3 --kinds kill"


@pytest.mark.parametrize(
    "wrong", [("--trials", "0"), ("--jobs", "0"), ("--ranks", "0"), ("--only", "-1"), ("--zero", "7"), ("--out", ".")]
)
def test_refuses(wrong, tmp_path, monkeypatch, capsys):
    """Nothing tried is no success; a folder of somebody's files is not emptied."""
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "thesis.tex"
    kept.write_text("x")
    with pytest.raises(SystemExit) as stopped:
        hammer.main(["--out", "new", *wrong])
    assert stopped.value.code == 2 and wrong[0] in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == [kept]
