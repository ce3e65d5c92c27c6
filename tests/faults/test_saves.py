"""Killed, or out of disk, at every phase of a save: the checkpoint before is whole, and the run resumes to the bit."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.runner import ROOT, Runs, assert_equal_checkpoints, assert_same_metrics, wait_until
from vtprune_train.training.checkpoint import manifest
from vtprune_train.training.checkpoint.lock import hold_run

pytestmark = pytest.mark.slow

INJECT = ROOT / "tests" / "faults" / "inject.py"
SETTINGS = ("train.save_every=1", "train.max_steps=4", "train.keep_last=2", "data.eval=[]", "data.workers=0")
STAGE = {1: "deepspeed=configs/deepspeed/zero0.json", 2: "deepspeed=configs/deepspeed/zero3.json"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("saves"))


@pytest.fixture(scope="module")
def whole(runs):
    for ranks in (1, 2):
        runs.run(f"whole{ranks}", *SETTINGS, STAGE[ranks], ranks=ranks)
    return {ranks: f"whole{ranks}" for ranks in (1, 2)}


def fail(runs, name, ranks, fault, expect, rank=0, step=3, *settings):
    """Train with a fault in the save of a step (with three checkpoints written, the first is deleted)."""
    env = {"FAULT": fault, "FAULT_RANK": str(rank), "FAULT_STEP": str(step)}
    return runs.run(name, *SETTINGS, STAGE[ranks], *settings, ranks=ranks, script=INJECT, env=env, expect=expect)


def left(runs, name):
    folder = runs.directory(name) / "checkpoints"
    return {path.name for path in folder.iterdir() if path.is_dir()}


def assert_resumes_to_the_bit(runs, name, whole, ranks):
    done = runs.run(name, *SETTINGS, STAGE[ranks], ranks=ranks)
    assert "resuming from" in done.stderr
    assert_same_metrics(runs.metrics(name), runs.metrics(whole[ranks]))
    assert_equal_checkpoints(runs.checkpoint(name), runs.checkpoint(whole[ranks]))
    assert left(runs, name) == {"step_00000003", "step_00000004"}


PHASES = {
    "before_weights": (2, "step_00000003.partial"),
    "in_shard": (2, "step_00000003.partial"),
    "before_manifest": (2, "step_00000003.partial"),
    "before_rename": (2, "step_00000003.partial"),
    "before_latest": (3, "step_00000003"),
    "while_deleting": (3, "step_00000001.deleting"),
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("phase", PHASES)
def test_killed_during_a_save(runs, whole, ranks, phase):
    """On two ranks the other one is alive and must neither hang nor publish."""
    name = f"{phase}{ranks}"
    fail(runs, name, ranks, phase, expect=-signal.SIGKILL if ranks == 1 else 1)
    newest, leftover = PHASES[phase]
    folder = runs.directory(name) / "checkpoints"
    assert leftover in left(runs, name)
    found = manifest.steps(folder)
    assert manifest.step_of(found[-1]) == newest and all(manifest.verify(path) is None for path in found)
    assert_resumes_to_the_bit(runs, name, whole, ranks)


def test_only_the_other_rank_is_killed_inside_its_shard(runs, whole):
    fail(runs, "other", 2, "in_shard", expect=1, rank=1)
    assert manifest.step_of(manifest.steps(runs.directory("other") / "checkpoints")[-1]) == 2
    assert_resumes_to_the_bit(runs, "other", whole, 2)


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1)])
def test_disk_full_during_a_save(runs, whole, ranks, rank):
    name = f"full{ranks}"
    done = fail(runs, name, ranks, "disk_full", 1, rank)
    assert f"the checkpoint of step 3 could not be written: rank {rank}: OSError" in done.stderr
    assert f"No space left on device: '{runs.directory(name) / 'checkpoints' / 'step_00000003.partial'}/" in done.stderr
    assert "step_00000002 is unchanged" in done.stderr
    assert left(runs, name) == {"step_00000001", "step_00000002"}, "the partial one is removed"
    assert_resumes_to_the_bit(runs, name, whole, ranks)


def test_too_little_room_is_seen_before_writing(runs, whole):
    runs.run("room", *SETTINGS, STAGE[2], "run.stop_after=2", ranks=2)
    done = fail(runs, "room", 2, "little_room", 1)
    assert "the first save will stop the run" in done.stderr, "said at the start"
    assert "GB free, but the checkpoint of step 3 needs" in done.stderr and "nothing was written" in done.stderr
    assert left(runs, "room") == {"step_00000001", "step_00000002"}
    assert_resumes_to_the_bit(runs, "room", whole, 2)


def test_a_background_save_writes_the_bytes_of_a_synchronous_one(runs, whole):
    runs.run("synchronous", *SETTINGS, STAGE[2], "train.save_in_background=false", ranks=2)
    one, two = (manifest.read_manifest(runs.checkpoint(name)) for name in ("synchronous", whole[2]))
    assert one.keys() == two.keys()
    # config.yaml and DeepSpeed's files name the run and the setting itself; lines of metrics.jsonl hold times.
    own = {name for name in one if name.endswith(".pt")} | {"config.yaml", "logs/metrics.jsonl.gz"}
    assert {name: one[name] for name in one.keys() - own} == {name: two[name] for name in two.keys() - own}
    assert_equal_checkpoints(runs.checkpoint("synchronous"), runs.checkpoint(whole[2]))


def test_two_runs_on_one_folder(runs):
    """The second is refused at once, and changes nothing; after SIGKILL of the first the folder is free."""
    first = runs.start("twice", *SETTINGS[:1], "train.max_steps=500", "data.eval=[]", STAGE[1])
    assert wait_until(lambda: len(runs.metrics("twice")) >= 2, first)
    done = runs.run("twice", *SETTINGS, STAGE[1], expect=2)
    assert "is in use by process" in done.stderr and "another run.name" in done.stderr
    assert first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = runs.run("twice", "train.max_steps=500", "run.stop_after=1", *SETTINGS[2:], STAGE[1])
    assert "resuming from" in done.stderr


def test_the_lock_survives_neither_its_process_nor_a_fork(tmp_path: Path):
    """A loader worker that outlives a killed rank does not keep the folder."""

    def hold(path, ready):
        hold_run(path)
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
        child.start()
        ready.send(child.pid)
        time.sleep(60)

    ours, theirs = multiprocessing.Pipe()
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, theirs))
    holder.start()
    orphan = ours.recv()
    with pytest.raises(ValueError, match=f"in use by process {holder.pid}"):
        hold_run(tmp_path)
    holder.kill()
    holder.join()
    try:
        hold_run(tmp_path)
    finally:
        os.kill(orphan, signal.SIGKILL)
    assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")
