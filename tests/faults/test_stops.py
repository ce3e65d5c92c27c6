"""Stopped at any moment and resumed: the same bits as a run that was never stopped."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.support.runner import Runs, assert_equal_checkpoints, assert_same_metrics, wait_until, workers_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("resume"))


SETTINGS = ("train.save_every=1", "train.epochs=3", "data.workers=1")


@pytest.fixture(scope="module")
def uninterrupted(runs):
    made = {}
    for ranks, stage in ((1, 0), (2, 3)):
        name = f"whole{ranks}"
        runs.run(name, *SETTINGS, f"deepspeed=configs/deepspeed/zero{stage}.json", ranks=ranks)
        made[ranks] = name
    return made


def test_stop_after_is_clean_and_resumes(runs, uninterrupted):
    settings = (*SETTINGS, "deepspeed=configs/deepspeed/zero0.json", "train.save_every=1000")
    runs.run("stopped", *settings, "run.stop_after=5")
    assert runs.checkpoint("stopped").name == "step_00000005"
    assert len(runs.metrics("stopped")) == 5
    assert not (runs.directory("stopped") / "eval.jsonl").exists(), "evaluation comes at the end of training"
    runs.run("stopped", *settings)
    assert_same_metrics(runs.metrics("stopped"), runs.metrics(uninterrupted[1]))
    assert_equal_checkpoints(runs.checkpoint("stopped"), runs.checkpoint(uninterrupted[1]))


def test_sigterm_saves_once_and_all_ranks_stop(runs, uninterrupted):
    settings = (*SETTINGS, "deepspeed=configs/deepspeed/zero3.json", "train.save_every=1000")
    process = runs.start("terminated", *settings, ranks=2, launcher="torchrun")
    assert wait_until(lambda: len(runs.metrics("terminated")) >= 3, process)
    ranks = children_with(process.pid, "train.py")
    workers = [worker.pid for rank in ranks for worker in workers_of(rank)]
    assert len(workers) >= 2
    for told in (ranks[-1], *workers):  # as a scheduler does: every process of the job, not only the rank
        os.kill(told, signal.SIGTERM)
    process.wait(timeout=120)
    assert process.returncode != 0
    assert "exitcode  : 143" in runs.log("terminated"), runs.log("terminated")[-3000:]
    saved = runs.checkpoint("terminated")
    assert [p.name for p in saved.parent.glob("step_*")] == [saved.name]
    assert len(runs.metrics("terminated")) == int(saved.name.removeprefix("step_"))
    runs.run("terminated", *settings, ranks=2)
    assert_equal_checkpoints(runs.checkpoint("terminated"), runs.checkpoint(uninterrupted[2]))


def test_settings_that_changed_are_told_on_resume(runs):
    settings = (*SETTINGS, "deepspeed=configs/deepspeed/zero0.json")
    runs.run("changed", *settings, "run.stop_after=1")
    now = ("model.train.projector=0.005", "train.clip=0.5", "data.workers=0", "run.stop_after=2")
    done = runs.run("changed", *settings, *now)
    told = [line.partition("changed since that checkpoint: ")[2] for line in done.stderr.splitlines()]
    expected = {
        "run.stop_after: 1 -> 2",
        "model.train.projector: 0.01 -> 0.005",
        "train.clip: 1.0 -> 0.5",
        "data.workers: 1 -> 0",
    }
    assert {line for line in told if line} == expected, done.stderr
    done = runs.run("changed", *settings, "pruning.keep=[0.5, 0.3, 0.125]", "data.train.0.take=first:9", expect=2)
    assert "  pruning.keep: checkpoint [0.5, 0.25, 0.125], now [0.5, 0.3, 0.125]\n" in done.stderr
    assert (
        "  data.train.0.take: checkpoint 'all', now 'first:9'\n" in done.stderr and "pruning.layers:" not in done.stderr
    )


def children_with(parent: int, word: str) -> list[int]:
    """Direct children whose command line holds ``word``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            ppid = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        if ppid == parent and word in command:
            found.append(int(entry.name))
    return found


def test_unreadable_images_are_counted_and_bounded(tmp_path):
    runs = Runs(tmp_path)
    settings = ("deepspeed=configs/deepspeed/zero0.json", "train.epochs=1", "data.eval=[]", "data.max_bad_share=0.5")
    runs.run("before", *settings, "run.stop_after=1")  # builds the index while all is well
    for name in ("train-0-0.png", "train-8-0.png"):
        picture = tmp_path / "data" / "images" / name
        picture.write_bytes(picture.read_bytes()[:-900])
    done = runs.run("bounded", *settings, "data.max_bad=2", ranks=2)
    assert "train-0-0.png" in done.stderr and "train-8-0.png" in done.stderr
    metrics = runs.metrics("bounded")
    assert sum(m["unreadable"] for m in metrics) == 2
    state = json.loads((runs.checkpoint("bounded") / "trainer.json").read_text())
    assert len(state["unreadable"]) == 2
    done = runs.run("over", *settings, "data.max_bad=1", expect=3)
    assert "more than data.max_bad=1" in done.stderr
    done = runs.run("share", *settings, "data.max_bad=9", "data.max_bad_share=0.05", expect=3)
    assert "2 samples could not be used, more than data.max_bad_share=0.05 of 20" in done.stderr
