"""Damaged checkpoints, changed data and settings, and the commands that look after checkpoints."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.runner import Runs, assert_equal_checkpoints, assert_same_metrics
from vtprune_train.cli import main
from vtprune_train.models.io.build import resolve_checkpoint
from vtprune_train.training.checkpoint import manifest
from vtprune_train.training.checkpoint.folder import CheckpointFolder

pytestmark = pytest.mark.slow

SETTINGS = (
    "train.save_every=1",
    "train.max_steps=4",
    "train.keep_last=3",
    "data.eval=[]",
    "data.workers=0",
    "deepspeed=configs/deepspeed/zero0.json",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def whole(runs):
    runs.run("whole", *SETTINGS)
    return runs.directory("whole")


@pytest.fixture
def copied(runs, whole, request):
    """A copy of the finished run, under the test's name, that may be damaged."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    shutil.copytree(whole, runs.directory(name))
    return runs.directory(name)


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def step(folder: Path, number: int) -> Path:
    return folder / "checkpoints" / f"step_{number:08d}"


DAMAGE = {
    "truncated": (truncate, "deepspeed/mp_rank_00_model_states.pt", "bytes instead of"),
    "flipped": (flip, "deepspeed/mp_rank_00_model_states.pt", "does not have the recorded SHA-256"),
    "missing": (Path.unlink, "trainer.json", "trainer.json is missing"),
    "manifest": (truncate, "manifest.json", "manifest.json cannot be read"),
    "no manifest": (Path.unlink, "manifest.json", "manifest.json cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_seen(copied, kind, capsys, caplog):
    """`verify` names the file with exit code 1, loading passes over to the one before, strict refuses."""
    damage, name, said = DAMAGE[kind]
    damage(step(copied, 4) / name)
    assert main(["checkpoint", "verify", str(copied)]) == 1
    assert said in capsys.readouterr().out
    folder = CheckpointFolder(copied / "checkpoints", 3)
    with pytest.raises(ValueError, match=r"step_00000004 is damaged.*train.resume=auto"):
        folder.newest_complete(strict=True)
    assert folder.newest_complete() == step(copied, 3)
    assert said in caplog.text


def test_a_damaged_checkpoint_is_named_and_passed_over(runs, whole, copied):
    flip(step(copied, 4) / "hf" / "model.safetensors")
    done = runs.run(copied.name, *SETTINGS, "train.resume=strict", expect=2)
    assert "step_00000004 is damaged" in done.stderr and "Traceback" not in done.stderr
    done = runs.run(copied.name, *SETTINGS)
    assert "step_00000004 is damaged" in done.stderr and "model.safetensors" in done.stderr
    assert (copied / "checkpoints" / "step_00000004.damaged").is_dir()
    assert_same_metrics(runs.metrics(copied.name), runs.metrics("whole"))
    assert_equal_checkpoints(step(copied, 4), step(whole, 4))


def test_leftovers_are_removed_whatever_they_are(tmp_path):
    folder, outside = tmp_path / "checkpoints", tmp_path / "outside"
    (folder / "step_00000001.partial" / "deepspeed").mkdir(parents=True)
    (folder / "step_00000002.partial").write_text("a file")
    (outside / "kept").mkdir(parents=True)
    (folder / "step_00000003.deleting").symlink_to(outside)
    (folder / "step_00000004.deleting").symlink_to(tmp_path / "nowhere")
    CheckpointFolder(folder, 3).clean()
    assert not list(folder.iterdir()) and (outside / "kept").is_dir()


def test_no_whole_checkpoint_is_left(runs, copied):
    for checkpoint in manifest.steps(copied / "checkpoints"):
        truncate(checkpoint / "config.yaml")
    before = runs.metrics(copied.name)
    done = runs.run(copied.name, *SETTINGS, expect=2)
    assert "every checkpoint in" in done.stderr and "is damaged" in done.stderr
    assert runs.metrics(copied.name) == before and len(manifest.steps(copied / "checkpoints")) == 3


@pytest.mark.parametrize("content", [None, "", "step_00000099", "nonsense/.."])
def test_latest_is_mended(copied, content):
    latest = copied / "checkpoints" / "latest"
    latest.unlink()
    if content is not None:
        latest.write_text(content)
    assert Path(resolve_checkpoint(str(copied))) == step(copied, 4) / "hf"
    folder = CheckpointFolder(copied / "checkpoints", 3)
    newest = folder.newest_complete()
    assert newest == step(copied, 4)
    folder.continue_from(newest)
    assert latest.read_text() == "step_00000004"


def test_changed_settings_are_named(runs, copied):
    """Nothing of the run is changed by a refusal; one start looks at two settings and the data together."""
    done = runs.run(copied.name, *SETTINGS, "run.seed=9", "data.max_length=299", expect=2)
    assert "run.seed: checkpoint 3, now 9" in done.stderr and "data.max_length: checkpoint 300, now 299" in done.stderr
    assert "train.init_from" in done.stderr and "Traceback" not in done.stderr
    done = runs.run(copied.name, *SETTINGS, "train.resume=never", expect=2)
    assert "set another run.name" in done.stderr
    data = runs.folder / "data" / "train.json"
    kept = data.read_text()
    records = json.loads(kept)
    try:
        data.write_text(json.dumps(records[:-1]))
        done = runs.run(copied.name, *SETTINGS, expect=2)
    finally:
        data.write_text(kept)
    assert "number and hash of the samples" in done.stderr
    assert manifest.verify(step(copied, 4)) is None


def test_list(copied, capsys):
    truncate(step(copied, 2) / "config.yaml")
    (copied / "checkpoints" / "step_00000005.partial").mkdir()
    assert main(["checkpoint", "list", str(copied)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["2", "3", "4"]
    assert [" no " in line for line in lines[1:4]] == [True, False, False]
    assert "pyramiddrop 0.5/0.25/0.125 at 1,2,3" in lines[3] and lines[3].endswith("<- latest")
    assert "step_00000005.partial" in lines[4]


def test_prune(copied, capsys):
    folder = copied / "checkpoints"
    manifest.point_latest(folder, "step_00000003")
    truncate(step(copied, 4) / "config.yaml")
    assert main(["checkpoint", "prune", str(copied), "--keep-last", "1", "--dry-run"]) == 0
    assert "would remove  step_00000002" in capsys.readouterr().out and len(manifest.steps(folder)) == 3
    assert main(["checkpoint", "prune", str(copied), "--keep-last", "1"]) == 0
    assert [path.name for path in manifest.steps(folder)] == ["step_00000003", "step_00000004"]
    assert main(["checkpoint", "prune", str(copied)]) == 2
    assert "--keep-last" in capsys.readouterr().err


def test_convert_and_resume_from_it(runs, copied, whole, capsys):
    """In place, atomically; then two ranks at ZeRO-2 go on from it."""
    for number in (4, 3):
        shutil.rmtree(step(copied, number))
    assert main(["checkpoint", "convert", str(copied)]) == 0
    assert not (step(copied, 2) / "deepspeed").exists() and manifest.verify(step(copied, 2)) is None
    (copied / "metrics.jsonl").unlink()  # the portable form restores it as well
    assert main(["checkpoint", "convert", str(copied)]) == 2
    assert "already has the portable format" in capsys.readouterr().err
    runs.run(copied.name, *SETTINGS[:-1], "deepspeed=configs/deepspeed/zero2.json", ranks=2)
    metrics, expected = runs.metrics(copied.name), runs.metrics("whole")
    assert [m["data_digest"] for m in metrics] == [m["data_digest"] for m in expected]
    assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in expected], abs=2e-4)


def test_convert_elsewhere(copied, tmp_path, capsys):
    assert main(["checkpoint", "convert", str(step(copied, 3)), "--out", str(tmp_path / "moved")]) == 0
    moved = tmp_path / "moved" / "step_00000003"
    assert manifest.verify(moved) is None and manifest.verify(step(copied, 3)) is None
    flip(moved / "portable" / "state_00001.safetensors")
    assert main(["checkpoint", "convert", str(moved), "--out", str(tmp_path / "again")]) == 2
    assert "is damaged" in capsys.readouterr().err and not (tmp_path / "again").exists()


def test_nothing_to_look_at(tmp_path, capsys):
    for action in ("list", "verify", "convert"):
        assert main(["checkpoint", action, str(tmp_path)]) == 2
        assert "contains no complete checkpoint" in capsys.readouterr().err
    assert main(["checkpoint", "list", str(tmp_path / "gone")]) == 2
    assert "does not exist" in capsys.readouterr().err
