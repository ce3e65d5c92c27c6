"""Decode workers that are killed or hang, in real runs of two ranks."""

import time
from pathlib import Path

import pytest

from tests.support.runner import Runs, assert_equal_checkpoints

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "faulty_worker.py"
IMAGE_FILE = "train-18-0.png"
SETTINGS = ("data.eval=[]", "train.save_every=2", "data.workers=2", "data.prefetch=1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("loader"))
    made.run("whole", *SETTINGS, ranks=2)
    return made


def faulty(runs, name, fault, *settings, **launch):
    env = {"FAULT": fault, "FAULTY_PICTURE": IMAGE_FILE, "FAULT_MARK": str(runs.folder / f"{name}.mark")}
    return runs.run(name, *SETTINGS, *settings, script=SCRIPT, env=env, timeout=120, ranks=2, **launch)


def test_after_a_worker_is_killed_the_run_ends_with_the_same_bits(runs):
    done = faulty(runs, "killed_once", "killed_once")
    assert (runs.folder / "killed_once.mark").exists()
    assert "was killed by SIGKILL (most likely the machine ran out of memory" in done.stderr
    assert "train18" in done.stderr and "the workers are restarted" in done.stderr
    assert_equal_checkpoints(runs.checkpoint("killed_once"), runs.checkpoint("whole"))
    digests = [[m["data_digest"] for m in runs.metrics(name)] for name in ("killed_once", "whole")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("fault", "settings", "said"),
    [
        ("killed", (), "This is the third worker that died on these samples"),
        ("hung", ("data.worker_timeout=3",), "has not finished a batch for data.worker_timeout=3 seconds"),
    ],
)
def test_a_fault_that_stays_ends_all_ranks_and_the_run_resumes(runs, fault, settings, said):
    began = time.monotonic()
    done = faulty(runs, fault, fault, *settings, expect=1)
    assert time.monotonic() - began < 90, "the other rank does not wait for its collective to time out"
    assert "WorkerError: decode worker " in done.stderr and said in done.stderr and "train18" in done.stderr
    if fault == "hung":
        assert "in wait_for_a_dead_disk" in done.stderr, "the stack of the worker"
    runs.run(fault, *SETTINGS, ranks=2)
    assert_equal_checkpoints(runs.checkpoint(fault), runs.checkpoint("whole"))


def test_the_data_wait_is_measured(runs):
    for metrics in runs.metrics("whole"):
        assert 0 <= metrics["data_wait"] <= metrics["data_wait_longest"]
        assert metrics["data_wait_share"] == pytest.approx(metrics["data_wait"] / metrics["step_time"])
        assert 0 <= metrics["batches_ready"] <= 2, "two workers, one batch ahead each"
