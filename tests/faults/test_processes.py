"""Ranks that die, raise, hang or are told to stop: the job ends soon, says why, and goes on where it can."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runner import ROOT, Runs, assert_equal_checkpoints, wait_until

HERE = Path(__file__).parent
FAULTY = HERE / "faulty.py"
SETTINGS = ("train.save_every=1", "train.max_steps=5", "data.eval=[]")
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def whole(runs):
    """Two ranks, undisturbed."""
    runs.run("whole", *SETTINGS, ranks=2)
    return runs.checkpoint("whole")


def faulty(runs, name, fault, *settings, ranks=2, expect=1):
    """A run with a fault; what it said, and how many seconds after the fault's step began it was over."""
    began = time.time()
    done = runs.run(name, *SETTINGS, *settings, ranks=ranks, script=FAULTY, env={"FAULT": fault}, expect=expect)
    metrics = runs.directory(name) / "metrics.jsonl"
    return done.stderr, time.time() - (metrics.stat().st_mtime if metrics.exists() else began)


def test_a_rank_that_raises_ends_the_job_with_its_own_error(runs, whole):
    said, seconds = faulty(runs, "raised", "raise:1:3")
    assert seconds < 10
    assert f"rank 1 on {HOST} failed (step 3, " in said and "RuntimeError: something in this rank alone" in said
    assert said.count("Traceback") == 1, "the others' broken collectives are no news"
    assert f"rank 0 stops (step 3, backward 1 of 1): rank 1 on {HOST} failed" in said
    runs.run("raised", *SETTINGS, ranks=2)
    assert_equal_checkpoints(runs.checkpoint("raised"), whole)


def test_a_rank_killed_in_the_middle_of_a_step(runs, whole):
    said, seconds = faulty(runs, "killed", "kill:1:3")
    assert seconds < 10
    assert f"rank 0 stops (step 3, backward 1 of 1): rank 1 on {HOST} is gone without a word" in said
    runs.run("killed", *SETTINGS, ranks=2)
    assert_equal_checkpoints(runs.checkpoint("killed"), whole)


def test_rank_0_killed(runs):
    said, seconds = faulty(runs, "killed0", "kill:0:2")
    assert seconds < 10 and "rank 1 stops (step 2, backward 1 of 1): rank 0 is gone without a word" in said


def test_a_hung_rank_is_named_with_stacks(runs, whole):
    said, seconds = faulty(runs, "hung", "hang:1:3", "train.watchdog_timeout=3")
    assert seconds < 20
    assert f"no progress for 3 s. rank 1 on {HOST}: step 3, counting targets, at fault, {FAULTY}:" in said
    assert "1 other rank(s) wait for it, such as rank 0: step 3, backward 1 of 1, waiting in all_reduce" in said
    stacks = [(runs.directory("hung") / "watchdog" / f"rank_0000{rank}.txt").read_text() for rank in (0, 1)]
    assert "faulty.py" in stacks[1] and "in fault" in stacks[1] and "in fault" not in stacks[0]
    assert "in all_reduce" in stacks[0] and "all_reduce" not in stacks[1].partition("Thread")[2]
    worker = stacks[1].partition("loader worker")[2]
    assert "_worker_loop" in worker
    runs.run("hung", *SETTINGS, ranks=2)
    assert_equal_checkpoints(runs.checkpoint("hung"), whole)
    assert not (runs.directory("hung") / "watchdog" / "rank_00002.txt").exists()


def test_a_hang_exits_124_and_a_healthy_run_leaves_no_stacks(runs, whole):
    faulty(runs, "alone", "hang:0:1", "train.watchdog_timeout=1", ranks=1, expect=124)
    assert not list((whole.parent.parent / "watchdog").iterdir())


def test_what_one_machine_lacks_is_said_by_it(runs):
    said, seconds = faulty(runs, "refused", "refuse:1:0")
    assert seconds < 30 and "cannot train:\n  a file is missing on this machine alone" in said
    assert "Traceback" not in said


def launch(runs, name, *settings, command, **environment):
    """Start a launcher of its own interpreter; what it says goes to the run's log."""
    env = {**runs.environment(), "FAULT": "none:0:0", **environment}
    env["PYTHONPATH"] = f"{ROOT}:{HERE}"
    given = runs.arguments(name, *SETTINGS, *settings)[1:]
    with (runs.folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen([*command, *given], cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)


def test_a_restart_goes_on_with_the_same_bits(runs, whole):
    command = [sys.executable, str(HERE / "faulty_launch.py"), "--nproc_per_node", "2"]
    process = launch(runs, "restarted", "train.max_restarts=2", command=command, FAULT="kill:1:3")
    assert process.wait(timeout=120) == 0, runs.log("restarted")[-3000:]
    log = runs.log("restarted")
    assert "restart 1 of at most 2 after a failure" in log and "restart 2" not in log
    assert "step_00000002" in log.partition("resuming from")[2]
    assert_equal_checkpoints(runs.checkpoint("restarted"), whole)


def test_what_a_restart_cannot_mend_is_not_tried_again(runs):
    command = [sys.executable, str(HERE / "faulty_launch.py")]
    settings = ("train.max_restarts=3", "data.train.0.path=nowhere.json")
    process = launch(runs, "useless", *settings, command=command)
    assert process.wait(timeout=60) == 2, runs.log("useless")[-3000:]
    assert "nowhere.json does not exist" in runs.log("useless") and "restart" not in runs.log("useless")


def test_two_machines_under_slurm_train_like_one_and_go_back_to_the_queue(runs, whole):
    """The batch script with a srun that starts two launchers here: its time is up after a few steps, then it goes on.
    Each machine has an index of its own."""
    environment = {
        "PATH": f"{HERE / 'fake_slurm'}:{runs.environment()['PATH']}",
        "FAKE_NODES": str(runs.folder / "nodes"),
        "CONFIG": str(runs.config),
        "GPUS": "1",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
        "MASTER_PORT": str(free_port()),
    }
    own = ("data.cache_dir=null", "train.save_every=1000")

    def submit():
        env = {**runs.environment(), **environment}
        given = [a for a in runs.arguments("slurm", *SETTINGS, *own)[3:] if not a.startswith("data.cache_dir=/")]
        command = [str(ROOT / "scripts" / "cluster" / "slurm.sbatch"), *given]
        with (runs.folder / "slurm.log").open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)

    process = submit()
    assert wait_until(lambda: runs.metrics("slurm"), process), runs.log("slurm")[-3000:]
    os.kill(process.pid, signal.SIGUSR1)
    assert process.wait(timeout=60) == 143, runs.log("slurm")[-3000:]
    assert "requeued 7" in runs.log("slurm")
    step = int(runs.checkpoint("slurm").name.removeprefix("step_"))
    assert step == len(runs.metrics("slurm")) < 5
    assert submit().wait(timeout=120) == 0, runs.log("slurm")[-3000:]
    assert f"resuming from {runs.directory('slurm')}/checkpoints/step_{step:08d}" in runs.log("slurm")
    assert_equal_checkpoints(runs.checkpoint("slurm"), whole)
    assert all(list((runs.folder / "nodes" / f"node{node}").rglob("index-*.arrow")) for node in (0, 1))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
