"""Ranks that die, raise, hang or are told to stop: the job ends soon, says why, and goes on where it can."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.runner import ROOT, Runs, all_end, assert_equal_checkpoints, wait_until

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
FAULTY = HERE / "faulty.py"
SETTINGS = ("train.save_every=1", "train.max_steps=5", "data.eval=[]")
HOST = socket.gethostname()
SOON = 150  # seconds, on a loaded machine too; a collective would wait half an hour for a dead rank


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def whole(runs):
    """Two ranks, undisturbed."""
    runs.run("whole", *SETTINGS, ranks=2)
    return runs.checkpoint("whole")


def faulty(runs, name, fault, *settings, ranks=2, expect=1, **launch):
    """A run with a fault; what it said, and how many seconds after the fault's step began it was over."""
    began = time.time()
    launch = {"script": FAULTY, "env": {"FAULT": fault}, **launch}
    done = runs.run(name, *SETTINGS, *settings, ranks=ranks, expect=expect, **launch)
    metrics = runs.directory(name) / "metrics.jsonl"
    return done.stderr, time.time() - (metrics.stat().st_mtime if metrics.exists() else began)


def test_a_rank_that_raises_ends_the_job_with_its_own_error(runs, whole):
    said, seconds = faulty(runs, "raised", "raise:1:3")
    assert seconds < SOON
    assert f"rank 1 on {HOST} failed (step 3, " in said and "RuntimeError: something in this rank alone" in said
    assert said.count("Traceback") == 1, "the others' broken collectives are no news"
    assert f"rank 0 stops (step 3, backward 1 of 1): rank 1 on {HOST} failed" in said
    runs.run("raised", *SETTINGS, ranks=2)
    assert_equal_checkpoints(runs.checkpoint("raised"), whole)


def test_a_rank_killed_in_the_middle_of_a_step(runs, whole):
    said, seconds = faulty(runs, "killed", "kill:1:3")
    assert seconds < SOON
    assert f"rank 0 stops (step 3, backward 1 of 1): rank 1 on {HOST} died without an error" in said
    runs.run("killed", *SETTINGS, ranks=2)
    assert_equal_checkpoints(runs.checkpoint("killed"), whole)


def test_rank_0_killed(runs):
    said, seconds = faulty(runs, "killed0", "kill:0:2")
    assert seconds < SOON and "rank 1 stops (step 2, backward 1 of 1): rank 0 died without an error" in said


def test_a_hung_rank_is_named_with_stacks(runs, whole):
    said, seconds = faulty(runs, "hung", "hang:1:3", "train.watchdog_timeout=12", "data.workers=1")
    assert seconds < SOON
    assert f"no progress for 12 s. rank 1 on {HOST}: step 3, at its start, at fault, {FAULTY}:" in said
    assert "1 other rank(s) are waiting, such as rank 0: step 3, backward 1 of 1, waiting in all_reduce" in said
    stacks = [(runs.directory("hung") / "watchdog" / f"rank_0000{rank}.txt").read_text() for rank in (0, 1)]
    assert "faulty.py" in stacks[1] and "in fault" in stacks[1] and "in fault" not in stacks[0]
    assert "in all_reduce" in stacks[0] and "all_reduce" not in stacks[1].partition("Thread")[2]
    worker = stacks[1].partition("decode worker 0 of rank 1")[2]
    assert "in _worker_loop" in worker
    runs.run("hung", *SETTINGS, ranks=2)
    assert_equal_checkpoints(runs.checkpoint("hung"), whole)
    assert not (runs.directory("hung") / "watchdog" / "rank_00002.txt").exists()


def test_a_hang_exits_124_and_a_healthy_run_leaves_no_stacks(runs, whole):
    faulty(runs, "alone", "hang:0:1", "train.watchdog_timeout=1", "data.workers=0", ranks=1, expect=124)
    assert not list((whole.parent.parent / "watchdog").iterdir())


def test_what_one_machine_lacks_is_said_by_it(runs):
    said, _ = faulty(runs, "refused", "refuse:1:0")
    assert "cannot train:\n  a file is missing on this machine alone" in said
    assert "Traceback" not in said


def test_a_rank_that_joins_after_another_failed_says_that_one_s_error(runs):
    """torchrun, which gives the ranks that are left time to end by themselves."""
    said, _ = faulty(runs, "late", "refuse_early:1:0", launcher="torchrun")
    assert "cannot train:\n  a file is missing on this machine alone" in said
    of_rank_0 = said.partition("rank 0 stops")[2].partition("torch.distributed.elastic")[0]
    assert f"rank 1 on {HOST} failed (starting): ValueError: a file is missing" in of_rank_0
    assert "_give_up" not in said and "gloo" not in said.partition("rank 0 stops")[0]


LAUNCH = {"script": HERE / "faulty_launch.py", "env": {"FAULT": "none:0:0", "PYTHONPATH": f"{ROOT}:{HERE}"}}


def test_a_restart_goes_on_with_the_same_bits(runs, whole):
    env = {**LAUNCH["env"], "FAULT": "kill:1:3"}
    done = runs.run("restarted", *SETTINGS, "train.max_restarts=2", script=LAUNCH["script"], env=env)
    assert "restart 1 of at most 2 after a failure" in done.stderr and "restart 2" not in done.stderr
    resumed = done.stderr.partition("resuming from")[2]  # the save of step 2 may have been cut short
    assert "step_00000002" in resumed or "step_00000001" in resumed
    assert_equal_checkpoints(runs.checkpoint("restarted"), whole)


def test_what_a_restart_cannot_mend_is_not_tried_again(runs):
    for setting, words in (
        ("data.train.0.path=nowhere.json", "the settings are wrong:\n  data.train.0.path"),
        ("data.max_length=9", "cannot train:\n  20 sample(s) are longer than data.max_length=9"),
    ):
        done = runs.run("useless", *SETTINGS, "train.max_restarts=3", setting, **LAUNCH, expect=2)
        assert done.stderr.count(words) == 1 and "restart" not in done.stderr, done.stderr


def test_restarts_are_bounded(runs):
    env = {**LAUNCH["env"], "FAULT": "always:1:1"}
    done = runs.run("bounded", *SETTINGS, "train.max_restarts=1", script=LAUNCH["script"], env=env, expect=1)
    assert done.stderr.count("restart 1 of at most 1") == 1 and "restart 2" not in done.stderr
    said = done.stderr.partition("restart 1 of at most 1")[2]
    assert said.count("RuntimeError: something in this rank alone") == 2, "by the rank, and by another that stops"
    assert re.search(r"ERROR rank 1 \(process \d+\) was the first to fail: it ended with exit code 1\n", said)


LONG = ("train.max_restarts=3", "train.save_every=1000", "train.max_steps=20000", "train.epochs=20000")


def launched(runs, name, *settings):
    """`vtprune launch` in the middle of training; the process, and the launcher as psutil has it."""
    process = runs.start(name, *SETTINGS, *LONG, *settings, **LAUNCH)
    assert wait_until(lambda: runs.metrics(name), process), runs.log(name)[-3000:]
    [launcher] = psutil.Process(process.pid).children()
    return process, launcher


def assert_saved_without_restart(runs, name):
    assert runs.checkpoint(name).name == f"step_{len(runs.metrics(name)):08d}"
    assert "restart" not in runs.log(name) and "Traceback" not in runs.log(name), runs.log(name)[-3000:]


def test_sigterm_to_the_launcher_saves_and_is_not_restarted(runs):
    process, launcher = launched(runs, "told")
    launcher.terminate()
    assert process.wait(timeout=120) == 143, runs.log("told")[-3000:]
    assert_saved_without_restart(runs, "told")


def test_ctrl_c_twice_and_a_second_start_meanwhile(runs):
    process, launcher = launched(runs, "interrupted")
    said = runs.run("interrupted", *SETTINGS, *LONG, **LAUNCH, expect=2).stderr
    assert f"is in use by process {launcher.children()[0].pid} on {HOST}, since " in said
    assert said.count("\n") == 2, "the launcher itself says so, before it starts ranks"
    launcher.send_signal(signal.SIGINT)
    launcher.send_signal(signal.SIGINT)
    assert wait_until(lambda: "SIGINT: finishing" in runs.log("interrupted"), process)
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 130, runs.log("interrupted")[-3000:]
    assert_saved_without_restart(runs, "interrupted")


def test_the_launcher_is_killed(runs):
    """Its ranks save and stop by themselves, and nothing of the run is left."""
    process, launcher = launched(runs, "orphaned", "data.workers=1")
    everyone = launcher.children(recursive=True)
    assert len(everyone) >= 4, "ranks and their loader workers"
    launcher.kill()
    assert all_end(everyone, SOON)
    process.wait(timeout=60)
    assert f"vtprune launch (process {launcher.pid}), which started this rank, has exited" in runs.log("orphaned")
    assert_saved_without_restart(runs, "orphaned")


def test_a_signal_to_the_launcher_before_there_are_ranks(runs):
    """While it imports PyTorch; started as a user does."""
    command = [sys.executable, "-m", "vtprune_train.cli", "launch", *runs.arguments("never")[1:]]
    process = subprocess.Popen(command, cwd=ROOT, env=runs.environment(), stderr=subprocess.PIPE, text=True)
    caught = Path(f"/proc/{process.pid}/status")
    bit = 1 << (signal.SIGHUP - 1)
    assert wait_until(lambda: int(caught.read_text().partition("SigCgt:")[2].split()[0], 16) & bit, process)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 130


def test_a_full_disk_is_named_by_all_ranks(runs):
    """Rank 0 raises, and can write neither to its log nor to torchrun's file; the other one names its error."""
    said, seconds = faulty(runs, "full", "full_disk:0:3")
    assert seconds < SOON
    named = f"rank 0 on {HOST} failed (step 3, at its start): OSError: [Errno 28] No space left on device: "
    assert f"rank 1 stops (step 3, backward 1 of 1): {named}'metrics.jsonl'" in said, said[-3000:]


def test_an_error_that_rank_0_tells_all_is_its_own(runs):
    (runs.directory("told_all") / "config.yaml" / "of_the_user").mkdir(parents=True)
    said, _ = faulty(runs, "told_all", "none:0:0")
    error = f"OSError: [Errno 39] Directory not empty: '{runs.directory('told_all') / 'config.yaml'}'"
    assert said.count("Traceback") == 1 and f"rank 0 on {HOST} failed (starting):" in said
    assert "rank 1 on" not in said and error in said


def test_a_launcher_that_cannot_restart_says_so(runs):
    done = runs.run("unheeded", *SETTINGS, "train.max_restarts=3", "train.max_steps=1")
    assert "train.max_restarts=3 has no effect: the launcher restarts the ranks 0 times" in done.stderr


def slurm(runs, *settings, **environment):
    """The command and environment of the batch script, as SLURM would run it on two machines with one GPU each."""
    command = [str(ROOT / "scripts" / "cluster" / "slurm.sbatch"), *runs.arguments("slurm", *SETTINGS, *settings)[3:]]
    env = {
        **runs.environment(),
        "PATH": f"{HERE / 'fake_slurm'}:{runs.environment()['PATH']}",
        "FAKE_NODES": str(runs.folder / "nodes"),
        "CONFIG": str(runs.config),
        "GPUS": "1",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
        "MASTER_PORT": str(free_port()),
        **environment,
    }
    return command, env


def test_two_machines_train_like_one(runs, whole):
    """The batch script for SLURM, with a srun that starts two launchers here, each with an index of its own."""
    command, env = slurm(runs, "data.cache_dir=null")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    assert_equal_checkpoints(runs.checkpoint("slurm"), whole)
    assert all(list((runs.folder / "nodes" / f"node{node}").rglob("index-*/manifest.json")) for node in (0, 1))


@pytest.mark.parametrize(("ended", "queued", "registration"), [(143, True, 0), (1, False, 0), (143, True, 2)])
def test_the_batch_script_goes_back_to_the_queue_when_its_time_is_up(runs, tmp_path, ended, queued, registration):
    """Also where SLURM does not know the step yet (for two seconds): the script asks again, and does not end itself."""
    (tmp_path / "vtprune").write_text(f"#!/bin/bash\ntrap 'sleep 0.2; exit {ended}' TERM\necho up\nsleep 60 & wait\n")
    (tmp_path / "vtprune").chmod(0o755)
    command, env = slurm(runs, FAKE_REGISTRATION_SECONDS=str(registration))
    env["PATH"] = f"{HERE / 'fake_slurm'}:{tmp_path}:{env['PATH']}"
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert [process.stdout.readline() for _ in range(2)] == ["up\n", "up\n"]
    process.send_signal(signal.SIGUSR1)
    process.wait(timeout=60)
    os.killpg(process.pid, signal.SIGKILL)  # the stand-ins' sleeps
    assert process.returncode == ended
    assert ("requeued 7" in process.stdout.read()) is queued
    assert registration == 0 or "could not be signalled; once more" in process.stderr.read()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
