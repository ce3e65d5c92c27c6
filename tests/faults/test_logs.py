"""What a run writes beside its checkpoints: restored or missed by name on resume, and no reason for a run to fail."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.support.runner import ROOT, VARYING, Runs, assert_equal_checkpoints, assert_same_metrics
from vtprune_train.training.checkpoint import manifest

pytestmark = pytest.mark.slow

LOGS = {"metrics.jsonl.gz", "eval.jsonl.gz", "spikes.jsonl.gz"}
INJECT = ROOT / "tests" / "faults" / "inject.py"
SETTINGS = (
    "train.save_every=3",
    "train.max_steps=8",
    "train.eval_every=2",
    "data.workers=0",
    "deepspeed=configs/deepspeed/zero0.json",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("logs"))
    runs.run("whole", *SETTINGS)
    runs.run("stopped", *SETTINGS, "run.stop_after=5")
    return runs


@pytest.fixture
def stopped(runs, request):
    """A copy of the run that stopped after step 5, with checkpoints of steps 3 and 5."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    shutil.copytree(runs.directory("stopped"), runs.directory(name))
    return runs.directory(name)


def evaluations(folder):
    lines = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def steps_on_the_board(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [event.step for event in EventAccumulator(str(folder / "tensorboard")).Reload().Scalars(tag)]


def assert_nothing_is_missing(runs, folder):
    assert_same_metrics(runs.metrics(folder.name), runs.metrics("whole"))
    assert evaluations(folder) == evaluations(runs.directory("whole"))
    assert steps_on_the_board(folder, "train/loss") == list(range(1, 9))
    assert steps_on_the_board(folder, "eval/loss") == [2, 4, 6, 8]
    assert_equal_checkpoints(runs.checkpoint(folder.name), runs.checkpoint("whole"))


def lines_of(path):
    return path.read_bytes().splitlines(True)


def the_end_is_missing(folder):
    path = folder / "metrics.jsonl"
    path.write_bytes(b"".join(lines_of(path)[:3]))
    (folder / "eval.jsonl").unlink()
    shutil.rmtree(folder / "tensorboard")


def zeros(folder):
    for name, whole in (("metrics.jsonl", 3), ("eval.jsonl", 1)):
        lines = lines_of(folder / name)
        (folder / name).write_bytes(b"".join(lines[:whole]) + bytes(sum(map(len, lines[whole:]))))


def the_middle_is_missing(folder):
    first, _, third, fourth, fifth = lines_of(folder / "metrics.jsonl")
    (folder / "metrics.jsonl").write_bytes(first + third + b"\xff" + fourth + fifth)
    (folder / "eval.jsonl").write_bytes(b"no line\n" + lines_of(folder / "eval.jsonl")[1])
    for path in (folder / "tensorboard").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def removed_and_the_newest_checkpoint_is_damaged(folder):
    (folder / "metrics.jsonl").unlink()
    (folder / "checkpoints" / "step_00000005" / "logs" / "eval.jsonl.gz").write_bytes(b"")


def foreign_lines(folder):
    """Of another run, and of steps at which none was due."""
    lines = [line.replace(b'"step": 4', b'"step": 3') for line in lines_of(folder / "eval.jsonl")]
    (folder / "eval.jsonl").write_bytes(b"".join(lines))
    (folder / "spikes.jsonl").write_text('{"step": 2, "loss": 1.0, "z": 9, "samples": []}\n')
    change_events(folder, lambda record: b"" if b"eval/" in record else record)


def change_events(folder, change):
    """Rewrite TensorBoard's only file, with ``change(record)`` for each of its records."""
    (path,) = (folder / "tensorboard").iterdir()
    content, records = path.read_bytes(), []
    while content:
        end = 16 + int.from_bytes(content[:8], "little")
        records.append(change(content[:end]))
        content = content[end:]
    path.write_bytes(b"".join(records))


def a_number_on_the_board_is_wrong(folder):
    (path,) = (folder / "tensorboard").iterdir()
    content = bytearray(path.read_bytes())
    content[content.rindex(b"train/loss") + 12] ^= 1
    path.write_bytes(content)


DAMAGE = {
    the_end_is_missing: ("lines of step 4 to 5", "lines of step 2, 4", "lacks step 1 to 5"),
    zeros: ("removed 1 unreadable line(s), the first is line 4", "lines of step 4"),
    the_middle_is_missing: ("lines of step 2, 4", "the first is line 1", "from metrics.jsonl and eval.jsonl"),
    foreign_lines: (
        "eval.jsonl: restored from step_00000005: lines of step 4; "
        "removed because step_00000005 does not have them: lines of step 3",
        "spikes.jsonl: removed because step_00000005 does not have them: lines of step 2",
        "lacks step 2, 4",
    ),
    a_number_on_the_board_is_wrong: ("lacks step 5; writing the scalars from step 5 on",),
    removed_and_the_newest_checkpoint_is_damaged: ("step_00000005 is damaged", "lines of step 1 to 3"),
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_lines_that_a_checkpoint_holds_are_restored(runs, stopped, damage):
    damage(stopped)
    done = runs.run(stopped.name, *SETTINGS)
    for said in DAMAGE[damage]:
        assert said in done.stderr
    assert_nothing_is_missing(runs, stopped)


def test_lines_outlast_steps_without_evaluation(runs, stopped):
    """The checkpoint of step 6 holds the lines too, though nothing was evaluated or looked at since step 5."""
    off = ("data.eval=[]", "train.eval_every=null", "train.spike_threshold=null")
    settings = [setting for setting in SETTINGS if "eval" not in setting]
    runs.run(stopped.name, *settings, *off, "run.stop_after=6")
    assert {path.name for path in (runs.checkpoint(stopped.name) / "logs").iterdir()} == LOGS
    (stopped / "eval.jsonl").unlink()
    done = runs.run(stopped.name, *SETTINGS)
    assert "eval.jsonl: restored from step_00000006: lines of step 2, 4" in done.stderr
    expected = evaluations(runs.directory("whole"))
    assert evaluations(stopped) == [line for line in expected if line["step"] != 6]


def test_lines_that_no_checkpoint_holds_are_named(runs, stopped):
    """A checkpoint that an older version wrote: whole lines after the gap are kept."""
    newest = stopped / "checkpoints" / "step_00000005"
    shutil.rmtree(newest / "logs")
    files = {name: entry for name, entry in manifest.read_manifest(newest).items() if not name.startswith("logs/")}
    manifest.write_manifest(newest, files)
    the_middle_is_missing(stopped)
    shutil.rmtree(stopped / "tensorboard")
    (stopped / "tensorboard").touch()
    done = runs.run(stopped.name, *SETTINGS)
    assert f"could not write to {stopped / 'tensorboard'} (FileExistsError" in done.stderr
    assert "metrics.jsonl: removed 1 unreadable line(s), the first is line 3; lost because step_00000005" in done.stderr
    assert "no copy of them: lines of step 2, 4" in done.stderr
    assert "eval.jsonl: removed 1 unreadable line(s), the first is line 1" in done.stderr
    expected = [line for line in runs.metrics("whole") if line["step"] not in (2, 4)]
    assert_same_metrics(runs.metrics(stopped.name), expected)
    assert [line["step"] for line in evaluations(stopped)] == [4, 6, 8]


def test_a_full_disk_in_the_middle_of_a_line(runs, stopped):
    """The run ends and says which file; its whole lines are there, and the next start goes on."""
    env = {"FAULT": "lines_full", "FAULT_STEP": "7"}
    done = runs.run(stopped.name, *SETTINGS, script=INJECT, env=env, expect=1)
    assert f"File too large: '{stopped / 'metrics.jsonl'}'" in done.stderr and "start again" in done.stderr
    assert [line["step"] for line in runs.metrics(stopped.name)] == [1, 2, 3, 4, 5, 6]
    assert (stopped / "metrics.jsonl").read_bytes().endswith(b"}\n")
    runs.run(stopped.name, *SETTINGS)
    assert_nothing_is_missing(runs, stopped)


def test_plots_and_monitors_do_not_end_a_run(runs, stopped):
    """A plot that cannot be written and a full disk for TensorBoard are warnings; the next start makes up for both."""
    (stopped / "loss.png").unlink()
    (stopped / "loss.png").mkdir()
    done = runs.run(stopped.name, *SETTINGS, script=INJECT, env={"FAULT": "board_full", "FAULT_STEP": "7"})
    assert f"could not write {stopped / 'loss.png'} (IsADirectoryError" in done.stderr
    assert f"could not write to {stopped / 'tensorboard'} (OSError: [Errno 28]" in done.stderr
    assert_same_metrics(runs.metrics(stopped.name), runs.metrics("whole"))
    assert max(steps_on_the_board(stopped, "train/loss")) < 7
    (stopped / "loss.png").rmdir()
    done = runs.run(stopped.name, *SETTINGS)
    assert "lacks step 7 to 8" in done.stderr and (stopped / "loss.png").is_file()
    assert_nothing_is_missing(runs, stopped)


def test_a_new_run_from_a_checkpoint_has_lines_of_its_own(runs, stopped):
    runs.run(
        "new", "train.max_steps=1", "train.resume=auto", f"train.init_from={stopped}", "data.eval=[]", *SETTINGS[3:]
    )
    assert [line["step"] for line in runs.metrics("new")] == [1]
    assert set(runs.metrics("new")[0]) >= set(VARYING)


def test_training_starts_without_matplotlib():
    """Missing or broken, it costs ``loss.png`` alone, which is drawn at the end."""
    code = "import sys; sys.modules['matplotlib'] = None; import vtprune_train.training.process; "
    code += "import vtprune_train.viz.evaluation_images"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
