"""What the console says of a run: plain sentences with the time, each once."""

import fcntl
import logging
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import warnings

import pytest

from tests.support.runner import ROOT, Runs, wait_until
from vtprune_train.processes.console import FORMAT, TIME, _OncePerMessage, quiet_libraries

SETTINGS = ("data.workers=0", "deepspeed=configs/deepspeed/zero0.json")
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (INFO|WARNING) \S")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("console"))


@pytest.mark.slow
def test_a_run_tells_its_story_on_two_ranks(runs):
    settings = (*SETTINGS, "train.max_steps=4", "train.eval_every=2")
    first = runs.run("told", *settings, "run.stop_after=3", ranks=2).stderr
    folder = runs.directory("told")
    begins = "new run with random weights: 20 samples, 4 steps of 6 samples, pruning by pyramiddrop, on 2 CPU ranks, in"
    assert f"{begins} {folder}" in first
    assert "INFO step 1 of 4: loss " in first and "INFO step 3 of 4: loss " in first
    assert "INFO step 2: held-out loss " in first
    saved = f"run.stop_after=3: saved step 3 in {folder / 'checkpoints' / 'step_00000003'}"
    assert f"{saved}; the same command without it continues from there" in first
    second = runs.run("told", *settings, ranks=2).stderr
    assert "INFO resumed from step 3: 20 samples, 4 steps of 6 samples" in second
    assert "done: step 4 of 4, 1 step by this process in 0:00:0" in second and f"; the run is in {folder}" in second
    assert f"vtprune export --model {folder} --out {folder}-export" in second
    assert f'vtprune generate --model {folder} --image FILE --prompt "..."' in second
    for said in (first, second):
        lines = said.splitlines()
        assert "FutureWarning" not in said and "Traceback" not in said
        stamped = [line[20:] for line in lines if LINE.match(line)]
        assert len(stamped) == len(set(stamped)) > 8
        assert len(lines) - len(stamped) == 2, "only the sample has lines of its own"


@pytest.mark.slow
def test_the_commands_at_the_end_work(runs):
    """As they are printed, but for the question."""
    said = runs.run("asked", *SETTINGS, "train.max_steps=1", "train.export=never", "data.eval=[]").stderr
    export, ask = (line.partition(": ")[2] for line in said.splitlines() if ": vtprune " in line)
    image = next((runs.folder / "data" / "images").iterdir())
    ask = ask.replace("FILE", str(image)).replace("...", "how bright?")
    for command in (export, ask):
        done = subprocess.run(command, shell=True, cwd=ROOT, env=runs.environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_sigterm_says_what_was_saved_and_how_to_continue(runs):
    process = runs.start("stopped", *SETTINGS, "train.max_steps=500", "data.eval=[]", launcher="python")
    assert wait_until(lambda: len(runs.metrics("stopped")) >= 2, process)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    step = len(runs.metrics("stopped"))
    saved = runs.directory("stopped") / "checkpoints" / f"step_{step:08d}"
    assert f"INFO SIGTERM: saved step {step} in {saved}; the same command continues from there" in runs.log("stopped")
    assert "done:" not in runs.log("stopped")


@pytest.mark.slow
def test_bar_and_lines_do_not_garble_each_other_on_a_terminal(runs):
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 150, 0, 0))  # rows and columns
    arguments = runs.arguments("bar", *SETTINGS, "train.max_steps=4", "train.eval_every=1")
    process = subprocess.Popen(
        ["python", *arguments], cwd=ROOT, env=runs.environment(), stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    said = b""
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 1)[0]:
            try:
                said += os.read(ours, 65536)
            except OSError:  # Linux: the other end is closed
                break
    assert process.wait() == 0, said
    shown = [line.rpartition(b"\r")[2].decode() for line in said.replace(b"\r\n", b"\n").split(b"\n")]
    assert any("train: 100%" in line and "4/4" in line for line in shown)
    assert not any("train:" in line and "held-out" in line for line in shown)
    assert sum(bool(LINE.match(line)) and "held-out" in line for line in shown) == 4


def test_a_warning_of_a_library_is_shown_once(capsys):
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT, TIME))
    logger, only_once = logging.getLogger("py.warnings"), _OncePerMessage()
    logger.addHandler(handler), logger.addFilter(only_once), logging.captureWarnings(True)
    try:
        for _ in range(3):
            with warnings.catch_warnings():  # forgets what was shown, as libraries do
                warnings.simplefilter("always")
                logging.captureWarnings(True)
                warnings.warn("look here", UserWarning, stacklevel=1)
                warnings.warn("`torch.distributed.x` is deprecated", FutureWarning, stacklevel=1)
                logging.captureWarnings(False)
    finally:
        logging.captureWarnings(False)
        logger.removeHandler(handler), logger.removeFilter(only_once)
    said = capsys.readouterr().err
    assert said.count("UserWarning: look here") == 1 and "torch.distributed" not in said


@pytest.mark.parametrize("captured", [False, True])
def test_the_loggers_of_libraries_are_restored_after_training(captured, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    loggers = [logging.getLogger(name) for name in ("py.warnings", "DeepSpeed", "transformers")]
    logging.captureWarnings(captured)
    try:
        before = [(logger.level, list(logger.filters)) for logger in loggers], warnings.showwarning
        with quiet_libraries():
            assert [logger.level for logger in loggers] == [logging.ERROR] * 3
        assert ([(logger.level, logger.filters) for logger in loggers], warnings.showwarning) == before
    finally:
        logging.captureWarnings(False)
