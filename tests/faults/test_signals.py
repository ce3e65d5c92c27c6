"""Ctrl-C, SIGHUP, SIGTERM and the death of a launcher, at any moment: saved once, the documented exit code."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest

from tests.support.runner import BIN, ROOT, Runs, all_end, wait_until, workers_of
from vtprune_train.cli import launch
from vtprune_train.data.building import _start_process
from vtprune_train.processes import launchers
from vtprune_train.processes.launchers import LAUNCHER, Launcher, _Process, launcher_name, launchers_above
from vtprune_train.processes.signals import (
    FINAL_FILE,
    STOP,
    STOPPING,
    agreed_code,
    asked_file,
    asked_to_stop,
    final_exit,
    launcher_was_asked,
    listens,
    make_notes,
    note_code,
    noted,
)

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
FAULTY = HERE / "faulty.py"
LONG = ("train.save_every=1000", "train.max_steps=100000", "train.epochs=100000", "data.eval=[]", "data.workers=1")
INT, HUP, TERM = signal.SIGINT, signal.SIGHUP, signal.SIGTERM


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("signals"))


def below(process):
    """The ranks (and launchers) of a run, and the loader workers."""
    return psutil.Process(process.pid).children(recursive=True)


def started(runs, name, *settings, steps=2, **launch):
    process = runs.start(name, *LONG, *settings, **launch)
    assert wait_until(lambda: len(runs.metrics(name)) >= steps, process), runs.log(name)[-3000:]
    return process


def assert_saved_once(runs, name):
    """One checkpoint, of the last step that the metrics know."""
    saved = runs.checkpoint(name)
    assert [path.name for path in saved.parent.glob("step_*")] == [saved.name]
    assert saved.name == f"step_{len(runs.metrics(name)):08d}"
    assert "Traceback" not in runs.log(name), runs.log(name)[-3000:]


@pytest.mark.parametrize("signals", [(INT,), (HUP, TERM), (TERM, INT, INT)])
def test_a_signal_to_all_processes_saves_once(runs, signals):
    name = "-".join(number.name for number in signals)
    process = started(runs, name)
    told = below(process)
    [rank] = psutil.Process(process.pid).children()
    assert len(workers_of(rank.pid)) == 1
    heard = f"{signals[0].name}: finishing this step and saving"
    for number in signals:
        for one in told:
            with contextlib.suppress(psutil.NoSuchProcess):  # the later ones may come too late
                one.send_signal(number)
        assert wait_until(lambda: heard in runs.log(name), process), "of signals that wait together none is the first"
    assert process.wait(timeout=120) == 128 + signals[0], runs.log(name)[-3000:]
    assert_saved_once(runs, name)


def test_ranks_that_hear_different_signals_agree(runs):
    """And signals that come while the checkpoint is written change nothing."""
    process = started(runs, "mixed", ranks=2)
    first, second = psutil.Process(process.pid).children()
    second.send_signal(TERM)
    first.send_signal(INT)
    folder = runs.directory("mixed") / "checkpoints"
    assert wait_until(lambda: list(folder.glob("*.partial")), process)
    for rank in (first, second):
        rank.send_signal(INT)
        rank.send_signal(HUP)
    process.wait(timeout=120)
    assert_saved_once(runs, "mixed")
    sums = {"loss": 1.0, "stop_2": 1.0, "stop_1": 0.0, "stop_15": 1.0}
    assert (agreed_code(sums), sums) == (130, {"loss": 1.0}), "on all ranks what the first of them heard"
    assert agreed_code(dict.fromkeys(STOP.requested(), 0.0)) == 0


def test_output_that_nobody_reads_costs_no_checkpoint(runs):
    """Ctrl-C ends ``tee`` as well; a closed terminal takes standard output and error with it."""
    reader, writer = os.pipe()
    process = runs._start("unread", *LONG, out=writer, err=writer, ranks=1)
    os.close(writer)
    assert wait_until(lambda: len(runs.metrics("unread")) >= 2, process)
    os.close(reader)
    steps = len(runs.metrics("unread"))
    assert wait_until(lambda: len(runs.metrics("unread")) > steps, process), "the bar breaks, training goes on"
    [rank] = psutil.Process(process.pid).children()
    rank.send_signal(HUP)
    assert process.wait(timeout=120) == 129
    assert runs.checkpoint("unread").name == f"step_{len(runs.metrics('unread')):08d}"


@pytest.mark.parametrize("where", ["hang", "hang_in_c"])
def test_a_signal_before_the_first_step(runs, where):
    """Also while the main thread is inside an extension, where Python runs no handler."""
    name = f"early-{where}"
    environment = {"FAULT": f"{where}:0:0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    process = runs.start(name, *LONG, script=FAULTY, env=environment)
    assert wait_until(lambda: any(thread_at(rank, where) for rank in below(process)), process)
    for rank in below(process):
        rank.send_signal(INT)
    assert process.wait(timeout=60) == 130, runs.log(name)[-3000:]
    assert "SIGINT before the first step: nothing to save" in runs.log(name)
    assert "Traceback" not in runs.log(name)


def thread_at(rank, where):
    """Whether a rank has come to its fault, which is after it has joined the others: it holds the hub's sockets."""
    return len([one for one in rank.net_connections() if one.status == psutil.CONN_ESTABLISHED]) >= 2 and where


def test_a_signal_in_the_last_step_leaves_the_evaluation_to_the_next_start(runs):
    settings = ("train.max_steps=3", "train.save_every=1000", "deepspeed=configs/deepspeed/zero0.json")
    environment = {"FAULT": "interrupt:0:3", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    runs.run("last", *settings, script=FAULTY, env=environment, expect=130)
    assert runs.checkpoint("last").name == "step_00000003"
    assert not (runs.directory("last") / "eval.jsonl").exists()
    runs.run("last", *settings)
    assert (runs.directory("last") / "eval.jsonl").exists() and len(runs.metrics("last")) == 3


def test_nothing_is_imported_while_a_signal_is_handled(tmp_path):
    """A second signal would find the module half imported."""
    code = f"""
import os, signal, subprocess, sys
from pathlib import Path
from vtprune_train.cli import launch
from vtprune_train.processes import signals
os.environ[signals.FINAL_FILE] = str(signals.make_notes(Path({str(tmp_path)!r})))
class Refuse:
    def find_spec(self, name, *_):
        raise AssertionError(name + " is imported in a handler")
with subprocess.Popen(["sleep", "20"]) as rank:
    sys.meta_path.insert(0, Refuse())
    signal.signal(signal.SIGINT, launch._pass_on)
    signal.raise_signal(signal.SIGINT)
    sys.exit(rank.wait() + 30)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 30 - TERM and not done.stderr, "`sleep` listens to none of ours: it gets SIGTERM"


def test_signals_that_are_ignored_stay_ignored():
    """``nohup`` ignores SIGHUP; a shell in the background SIGINT."""
    code = "import signal; from vtprune_train.processes.signals import STOP; STOP.listen(); "
    code += "signal.raise_signal(signal.SIGHUP); print(STOP.number); "
    code += "signal.raise_signal(signal.SIGINT); import time; time.sleep(60)"
    done = subprocess.run(["sh", "-c", f"trap '' HUP; {sys.executable} -c '{code}'"], cwd=ROOT, capture_output=True)
    assert done.stdout == b"None\n" and done.returncode == 130
    assert done.stderr.endswith(b" SIGINT before the first step: nothing to save\n") and done.stderr.count(b"\n") == 2


def test_a_signal_after_the_ranks_finds_no_handler_of_theirs(runs, monkeypatch):
    """A second Ctrl-C while the launcher's interpreter shuts down."""
    before = [signal.getsignal(number) for number in STOPPING]
    handlers = []

    def torchrun(command, config):
        handlers.extend(signal.getsignal(number) for number in STOPPING)
        return 0

    monkeypatch.setattr(launch, "_torchrun", torchrun)
    monkeypatch.setattr(launch, "keep_streams", lambda: None)
    monkeypatch.setenv(LAUNCHER, "")
    assert launch.launch(["--config", "llava_next_pdrop.yaml", f"run.output_dir={runs.folder}"]) == 0
    assert handlers == [launch._pass_on] * 3
    assert [signal.getsignal(number) for number in STOPPING] == before


def test_listening_ends_without_a_trace():
    code = """
import signal, threading
from vtprune_train.processes.signals import STOP, STOPPING
heard = []
for number in STOPPING:
    signal.signal(number, lambda number, frame: heard.append(number))
before, threads = [signal.getsignal(number) for number in STOPPING], threading.active_count()
for _ in range(2):
    STOP.act = heard.append
    assert STOP.listen() and not STOP.listen()
    signal.raise_signal(signal.SIGHUP)
    STOP.restore()
    assert heard.pop() == signal.SIGHUP
    assert [signal.getsignal(number) for number in STOPPING] == before and STOP.number is None
    assert threading.active_count() == threads and signal.set_wakeup_fd(-1) == -1
signal.raise_signal(signal.SIGTERM)
assert heard[-1] == signal.SIGTERM
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_training_within_a_program_gives_its_handlers_back(runs, tmp_path):
    script = tmp_path / "program.py"
    script.write_text("""
import signal, sys
from vtprune_train.cli import train_main
from vtprune_train.processes.signals import STOPPING
signal.signal(signal.SIGTERM, lambda *_: sys.exit(77))
before = [signal.getsignal(number) for number in STOPPING]
assert train_main(sys.argv[1:]) == 0
assert [signal.getsignal(number) for number in STOPPING] == before
signal.raise_signal(signal.SIGTERM)
""")
    runs.run("within", "data.eval=[]", "data.workers=0", "train.max_steps=1", script=script, expect=77)


LATE = """
import os, signal
from vtprune_train.processes import signals

class Late:
    def __del__(self):  # globals are cleared last of all
        for number in signals.STOPPING:
            os.kill(os.getpid(), number)

late = Late()
signals.{listen}()
raise SystemExit(7)
"""


@pytest.mark.parametrize("listen", ["STOP.listen", "quit_on_signals"])
def test_a_signal_while_python_shuts_down_does_not_change_the_exit_code(listen):
    done = subprocess.run([sys.executable, "-c", LATE.format(listen=listen)], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (7, b"")


def test_codes_are_noted_on_a_full_disk(tmp_path, monkeypatch):
    """The launcher's and the ranks', so that a signal is neither lost nor followed by a restart."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "notes", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        note = make_notes(tmp_path)
        monkeypatch.setenv(FINAL_FILE, str(note))
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "filler").write_bytes(bytes(2**17))
        assert not launcher_was_asked() and not asked_to_stop() and noted(note) is None
        note_code(asked_file(str(note)), 130)
        assert launcher_was_asked() and asked_to_stop() and noted(note) == 130
        assert (final_exit(2), noted(note)) == (0, 2)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert final_exit(3) == 3, "someone has removed the folder"


def test_a_rank_that_does_not_listen_yet_is_known():
    """Python would answer SIGINT by a traceback; the launcher sends it SIGTERM."""
    code = "import sys; from vtprune_train.processes.signals import STOP; print(flush=True); input(); STOP.listen(); "
    code += "print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as rank:
        for listening in (False, True):
            rank.stdout.readline()
            assert listens(rank.pid) == listening
            rank.stdin.write("\n")
            rank.stdin.flush()


def test_processes_that_index_outlive_signals_to_all():
    with ProcessPoolExecutor(1, get_context("spawn"), _start_process, (None,)) as pool:
        pid = pool.submit(os.getpid).result()
        for number in STOPPING:
            os.kill(pid, number)
        assert pool.submit(os.getpid).result() == pid


COMMANDS = {
    "torchrun": "/env/bin/python3.11 /env/bin/torchrun --standalone train.py",
    "python -m torch.distributed.run": "python -u -X dev -m torch.distributed.run --nproc_per_node 2 train.py",
    "deepspeed": "/env/bin/python /env/bin/deepspeed --num_gpus 2 train.py",
    "python -m deepspeed.launcher.launch": "/env/bin/python -u -m deepspeed.launcher.launch --world_info=x train.py",
    "accelerate": "python /env/bin/accelerate launch train.py",
    "vtprune launch": "/env/bin/python /env/bin/vtprune launch --config torchrun",
}


def test_launchers_are_known_by_their_command_line():
    for name, command in COMMANDS.items():
        assert launcher_name(command.split()) == name
    assert launcher_name(["python", "-m", "vtprune_train.cli", "launch"]) == "vtprune launch"
    others = ("bash -c torchrun", "nohup torchrun", "python train.py torchrun", "python -c torchrun", "python",
              "vtprune train --config launch", "python -m vtprune_train.cli train", "sh torchrun.sh", "")  # fmt: skip
    for other in others:
        assert launcher_name(other.split()) is None, other


def test_a_launcher_is_gone_when_it_is_a_zombie_or_another_process_has_its_number():
    with subprocess.Popen(["sleep", "60"]) as process:
        state = launchers._process(process.pid)
        launcher = Launcher("x", process.pid, state.started)
        assert launcher.is_alive() and not Launcher("x", process.pid, state.started - 1).is_alive()
        process.kill()
        deadline = time.monotonic() + 20
        while launcher.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not launcher.is_alive(), "nobody has waited for it yet"
    assert not launcher.is_alive()


def test_processes_that_may_not_be_looked_at_are_no_news(monkeypatch):
    """``/proc`` hides other users' processes with ``hidepid=1``; without descriptors nothing can be opened."""
    launcher = Launcher("x", os.getpid(), launchers._process(os.getpid()).started)

    def refuse(number):
        def read_text(self):
            raise OSError(number, os.strerror(number), str(self))

        return read_text

    monkeypatch.setattr(Path, "read_text", refuse(errno.EPERM))
    assert launchers_above() == []
    for number in (errno.EPERM, errno.EMFILE):
        monkeypatch.setattr(Path, "read_text", refuse(number))
        assert launcher.is_alive()
    monkeypatch.setattr(Path, "read_text", refuse(errno.ENOENT))
    assert not launcher.is_alive()


@pytest.mark.parametrize(("variable", "name"), launchers.VARIABLES.items())
def test_a_launcher_that_was_killed_before_its_rank_could_look_is_gone(monkeypatch, variable, name):
    parents, commands = {300: 200, 200: 1, 1: 0}, {300: "sh", 200: "bash", 1: "/sbin/init"}
    monkeypatch.setattr(os, "getppid", lambda: 300)
    monkeypatch.setattr(launchers, "_process", lambda pid: _Process(parents[pid], "S", 1) if pid in parents else None)
    monkeypatch.setattr(launchers, "_command", lambda pid: [commands[pid]])
    monkeypatch.setattr(os, "getsid", lambda pid: 400)
    assert launchers.launchers_above() == [], "nothing says that there was one"
    monkeypatch.setenv(variable, "1")
    [launcher] = launchers.launchers_above()
    assert str(launcher) == name and not launcher.is_alive()
    monkeypatch.setattr(os, "getsid", lambda pid: 0)
    assert launchers.launchers_above() == [], "started from outside of this container"
    monkeypatch.setattr(os, "getsid", lambda pid: 400)
    commands[300] = "/env/bin/python3"
    assert launchers.launchers_above() == [], "a launcher that is not known"


def test_ranks_that_lose_their_launcher_save_and_stop(runs):
    with subprocess.Popen(["sleep", "600"]) as launcher:
        announced = f"{launcher.pid} {launchers._process(launcher.pid).started}"
        process = started(runs, "orphans", ranks=2, env={LAUNCHER: announced})
        everyone = below(process)
        launcher.kill()
    process.wait(timeout=120)
    assert_saved_once(runs, "orphans")
    assert f"vtprune launch (process {launcher.pid}), which started this rank, has exited: finish" in runs.log(
        "orphans"
    )
    assert all_end(everyone, 20)


@pytest.mark.parametrize(
    ("command", "killed"),
    [
        (("torchrun", "--standalone", "--nproc_per_node", "2"), ["torchrun"]),
        (("deepspeed", "--num_gpus", "2"), ["deepspeed"]),
        (("deepspeed", "--num_gpus", "2"), ["deepspeed", "deepspeed.launcher.launch"]),
    ],
)
def test_ranks_notice_that_a_launcher_is_killed(runs, tmp_path, command, killed):
    """The launchers themselves, above ranks that need no time to start."""
    command = [str(BIN / command[0]), *command[1:]]
    if killed[0] == "deepspeed":
        command += ["--master_port", str(free_port())]
    command += [str(HERE / "listener.py"), str(tmp_path / "heard")]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=runs.environment(), stdout=log, stderr=log, start_new_session=True
        )
    assert wait_until(lambda: len(list(tmp_path.glob("heard.up.*"))) == 2, process), (tmp_path / "log").read_text()
    everyone = [psutil.Process(process.pid), *below(process)]
    for name in killed:
        [one] = [one for one in everyone if one.is_running() and runs_program(one, name)]
        one.kill()
    process.wait(timeout=60)
    deadline = time.monotonic() + 30
    while len(heard := [path for path in tmp_path.glob("heard.[01]") if path.read_text()]) < 2:
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.05)
    assert {path.read_text() for path in heard} == {str(int(TERM))}
    assert all_end(everyone, 30), "nothing is left of it"


def runs_program(process, name):
    words = process.cmdline()[1:4]  # none, if it was just killed
    return bool(words) and name in (Path(words[0]).name, words[-1])


def test_a_second_start_names_the_run_although_the_port_is_taken(runs):
    """DeepSpeed's launcher gives every job the same port."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    rank["MASTER_PORT"] = str(free_port())
    first = started(runs, "held", env=rank)
    [holder] = psutil.Process(first.pid).children()
    said = runs.run("held", *LONG, env=rank, expect=2).stderr
    assert f"is in use by process {holder.pid} on {socket.gethostname()}, since " in said and "Traceback" not in said
    said = runs.run("other", *LONG, env=rank, expect=2).stderr
    assert f"port {rank['MASTER_PORT']} of 127.0.0.1, where the ranks meet, is already in use" in said
    assert "--master_port" in said and "Traceback" not in said
    holder.send_signal(TERM)
    assert first.wait(timeout=120) == 143
    assert_saved_once(runs, "held")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
