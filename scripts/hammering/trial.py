"""Runs one trial: interrupted starts, damaged files, and checks of the final state."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hammering import damage
from hammering.plans import INDEXING, SAVED_STEPS, STEPS, Fault, Settings, Trial
from tests.support.runner import ROOT, WARM, Process, Runs, assert_equal_checkpoints, assert_same_metrics, kill, stacks
from vtprune_train.training.checkpoint import manifest

STARTING = threading.Lock()  # trials run side by side and share the parent
SCRIPT = ROOT / "tests" / "faults" / "inject.py"
TIMEOUT = 240.0  # seconds of a start
PATIENCE = 60.0  # seconds for all processes of a start to end
DISK = "160m"  # a checkpoint needs 64 MiB in addition to its size
MOST_STARTS = 3  # undisturbed ones, until the run is finished
TRACEBACK = "Traceback (most recent call last)"
REFUSED, INTERRUPTED, TERMINATED = 2, 130, 143
NAMED_IN_LOG = (
    "checkpoint", "manifest", "latest", "index column", "index manifest", "index piece", "tokenizer", "leftover",
)  # fmt: skip
# Messages if it is rebuilt; without a manifest, as in older versions.
NOT_SEEN = (("remove", "index piece", "*.npz"), ("remove", "tokenizer", "manifest.json"))


class Failed(Exception):  # noqa: N818 (the outcome of a trial)
    """Raised if something was lost or not reported."""


class Refused(Exception):  # noqa: N818
    """Raised if a start refused to run and named the damage."""


def check(right: bool, what: str, output: str = "") -> None:
    if not right:
        raise Failed(f"{what}\n{output[-3000:]}" if output else what)


@dataclass
class Started:
    """A start that has ended: its exit code (from a launcher, 1 for every code other than 0) and its output."""

    code: int
    output: str
    happened: bool
    launched: bool

    def ended_with(self, *codes: int) -> bool:
        return self.code in codes or (self.launched and self.code == 1 and any(codes))


@dataclass
class Result:
    trial: Trial
    outcome: str = "equal"  # or refused, failed
    reason: str = ""
    missed: list[Fault] = field(default_factory=list)  # faults that were not reached
    seconds: float = 0.0


class Run:
    """The run of one trial in its own folder; all trials share the data."""

    def __init__(self, runs: Runs, folder: Path, settings: Settings):
        self.runs, self.folder, self.settings = runs, folder, settings
        self.run_dir, self.cache = folder / "runs" / "run", folder / "cache"
        self.disk: Path | None = None
        self.starts = 0

    def checkpoints(self) -> list[Path]:
        return manifest.steps(self.run_dir / "checkpoints")

    def step(self) -> int:
        found = self.checkpoints()
        return manifest.step_of(found[-1]) if found else 0

    def start(self, *overrides: str, fault: Fault | None = None) -> Started:
        """Start a run, wait until every process has ended, and return the result."""
        self.starts += 1
        env = {"FAULT": "none", "PYTHONWARNINGS": "ignore::FutureWarning"}  # of PyTorch, about DeepSpeed
        if fault is not None:
            env |= {
                "FAULT": fault.moment,
                "FAULT_ACT": fault.what,
                "FAULT_RANK": fault.rank,
                "FAULT_STEP": str(min(STEPS, self.step() + fault.offset)),
                "FAULT_FOLDER": str(self.folder),
                **({"FAULT_DISK": str(self.disk)} if self.disk else {}),
            }
        settings = (
            f"run.output_dir={self.folder / 'runs'}", f"data.cache_dir={self.cache}",
            *self.settings.overrides(), *overrides,
        )  # fmt: skip
        log = self.folder.parent / f"{self.folder.name}.start_{self.starts}.log"
        with log.open("wb") as file:
            arguments = self.runs.arguments("run", *settings, script=SCRIPT)
            with STARTING:
                process = WARM.start(
                    arguments, ranks=self.settings.ranks, cwd=ROOT, env={**self.runs.environment(), **env},
                    out=file.fileno(), err=file.fileno(),
                )  # fmt: skip
            try:
                code = process.wait(timeout=TIMEOUT)
            except subprocess.TimeoutExpired:
                where = stacks(process.pid)
                kill(process)
                raise Failed(f"it hangs\n{where}\n{log.read_text()[-3000:]}") from None
            wait_for_the_end(process)
        output = log.read_text(errors="replace")
        return Started(code, output, happened="\nFAULT " in output, launched=self.settings.ranks > 1)


def wait_for_the_end(process: Process) -> None:
    """Wait until every process of the start's group has ended."""
    deadline = time.monotonic() + PATIENCE
    while left := members(process.pid):
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            raise Failed(f"processes {left} are left {PATIENCE:g} s after the start had ended")
        time.sleep(0.02)


def members(group: int) -> list[int]:
    """The running processes of a group."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(entry.name))
    return found


# ---- carrying out -----------------------------------------------------------------------------------------------


def run_trial(runs: Runs, trial: Trial, folder: Path, reference: Callable[[Settings], Path]) -> Result:
    """Run a trial; its folder is kept if something failed."""
    result, began = Result(trial), time.monotonic()
    whole = reference(trial.settings)
    try:
        with on_disk(folder, any(fault.real for fault in trial.faults)) as disk:
            run = Run(runs, folder, trial.settings)
            run.disk = disk
            for position, fault in enumerate(trial.faults):
                if not carry_out(run, fault, last=position == len(trial.faults) - 1):
                    result.missed.append(fault)
            finish(run)
            compare(run, whole)
    except Refused as refused:
        result.outcome, result.reason = "refused", str(refused)
    except (Failed, AssertionError) as failed:
        result.outcome, result.reason = "failed", str(failed) or repr(failed)
    result.seconds = time.monotonic() - began
    if result.outcome != "failed":
        shutil.rmtree(folder, ignore_errors=True)
        for log in folder.parent.glob(f"{folder.name}.start_*.log"):
            log.unlink()
    return result


@contextmanager
def on_disk(folder: Path, wanted: bool) -> Any:
    """A context with the trial's folder, mounted as a small file system if required and possible (as root)."""
    folder.mkdir(parents=True)
    if not wanted or os.geteuid() or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "hammer", str(folder)], capture_output=True
    ).returncode:  # fmt: skip
        yield None
        return
    try:
        yield folder
    finally:
        kept = Path(tempfile.mkdtemp(dir=folder.parent))
        (folder / "filler").unlink(missing_ok=True)
        shutil.copytree(folder, kept, dirs_exist_ok=True)  # what failed is looked at later
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()
        kept.rename(folder)


def carry_out(run: Run, fault: Fault, last: bool) -> bool:
    """Execute one fault; false if it was not reached.

    Raises:
        Failed: the start ended or reported otherwise than it should.
        Refused: a start after damage refused to run.
    """
    if fault.kind == "damage":
        return carry_out_damage(run, fault, last)
    if fault.moment in INDEXING:
        shutil.rmtree(run.cache, ignore_errors=True)
    if fault.moment == "in_tokenizer" and run.checkpoints():
        return False
    if fault.moment in ("loading", "after_loading") and not run.checkpoints():
        undisturbed(run, 1)
    stop = min(STEPS, run.step() + (fault.offset if fault.what == "stop_after" else SAVED_STEPS))
    bound = [] if last and fault.what != "stop_after" else [f"run.stop_after={stop}"]
    if fault.what == "stop_after":
        started = run.start(*bound)
        check(started.code == 0, f"exit code {started.code}", started.output)
        check(run.step() == stop, f"stopped at step {run.step()} instead of {stop}", started.output)
        return True
    started = run.start(*bound, fault=fault)
    if run.disk:
        (run.disk / "filler").unlink(missing_ok=True)
    judge(run, fault, started, stop if bound else STEPS)
    return started.happened


def undisturbed(run: Run, steps: int) -> Started:
    """Start a run that trains some steps."""
    started = run.start(f"run.stop_after={min(STEPS, run.step() + steps)}")
    check(started.code == 0, f"an undisturbed start ended with exit code {started.code}", started.output)
    return started


def carry_out_damage(run: Run, fault: Fault, last: bool) -> bool:
    if fault.moment == "index piece":
        shutil.rmtree(run.cache, ignore_errors=True)
        broken = run.start(fault=Fault("kill", "kill", "writing_index", "any"))
        check(broken.happened, "the index was not built", broken.output)
    elif len(run.checkpoints()) < 2 or not run.cache.exists():
        undisturbed(run, 2 * run.settings.save_every)
    found = run.checkpoints()
    path = damage.apply(fault.what, fault.moment, fault.pick, run.run_dir, run.cache, found[-1] if found else None)
    if path is None:
        return False
    started = run.start(*([] if last else [f"run.stop_after={min(STEPS, run.step() + 1)}"]))
    judge_damage(run, fault, path, started)
    return True


def finish(run: Run) -> None:
    """Start until all steps are done."""
    for _ in range(MOST_STARTS):
        started = run.start()
        check(started.code == 0, f"the start after the faults ended with exit code {started.code}", started.output)
        check(TRACEBACK not in started.output, "a traceback, although the run succeeded", started.output)
        if run.step() == STEPS:
            return
    raise Failed(f"not finished after {MOST_STARTS} undisturbed starts: step {run.step()} of {STEPS}")


# ---- judging ----------------------------------------------------------------------------------------------------


def judge(run: Run, fault: Fault, started: Started, end: int) -> None:
    """Check exit code and messages of an interrupted start as documented in docs/metrics.md and docs/faults.md;
    without the fault it would have ended after step ``end``."""
    output = started.output
    if not started.happened:
        check(started.code == 0, f"exit code {started.code}, although it was not disturbed", output)
        return
    if fault.kind == "disk":
        judge_full_disk(fault, started)
        return
    check(TRACEBACK not in output, "a traceback for an error outside the code", output)
    if fault.what == "kill_worker":
        check(started.code == 0, f"exit code {started.code} after the death of a worker", output)
        return
    if fault.kind == "stop":
        code = INTERRUPTED if fault.what.startswith("sigint") else TERMINATED
        done = [0] if run.step() == end else []  # too late to stop anything
        check(started.ended_with(code, *done), f"exit code {started.code}, not {code}", output)
        return
    check(started.code != 0 or fault.what == "kill_launcher", "exit code 0 after a kill", output)
    if fault.what == "kill" and run.settings.ranks > 1 and fault.rank != "any":
        other = re.search(rf"rank {fault.rank}( on \S+)? is gone", output)
        check(other is not None, f"no rank reports that rank {fault.rank} is gone", output)


def judge_full_disk(fault: Fault, started: Started) -> None:
    output = started.output
    if fault.moment == "drawing":
        check(started.code == 0, f"exit code {started.code} because of an image that could not be drawn", output)
        return
    if started.code == 0 and fault.real:  # there was room for what was still written
        return
    check(started.code != 0, "exit code 0 with a full disk", output)
    lines = [line for line in output.splitlines() if "No space left on device" in line or "GB free" in line]
    check(bool(lines), "no rank reports that the disk is full", output)
    check(any("/" in line for line in lines), "no path is named where the disk is full", output)


def judge_damage(run: Run, fault: Fault, path: Path, started: Started) -> None:
    output, name = started.output, path.name
    seen = not any((fault.what, fault.moment) == case[:2] and path.match(case[2]) for case in NOT_SEEN)
    if fault.moment in ("checkpoint", "manifest"):
        name = path.relative_to(run.run_dir / "checkpoints").parts[0]
    elif fault.moment == "tokenizer":
        name = str(path.parent)
    if started.ended_with(REFUSED) and TRACEBACK not in output and name in output:
        raise Refused(output.strip().splitlines()[-1])
    check(started.code == 0, f"exit code {started.code} after {path} was damaged", output)
    check(TRACEBACK not in output, f"a traceback after {path} was damaged", output)
    if fault.moment in NAMED_IN_LOG and seen:
        check(name in output, f"{path} was damaged, and nothing says so", output)


def compare(run: Run, whole: Path) -> None:
    """Compare all files of the run with those of an undisturbed run.

    Raises:
        Failed, AssertionError: something differs.
    """
    final = run.checkpoints()[-1]
    check(manifest.step_of(final) == STEPS, f"the last checkpoint is {final.name}")
    check((problem := manifest.verify(final)) is None, f"the last checkpoint is damaged: {problem}")
    check(manifest.named_latest(final.parent) == final, "latest does not name the last checkpoint")
    try:
        assert_equal_checkpoints(final, whole / "checkpoints" / final.name)
    except AssertionError as error:
        raise Failed(f"the last checkpoint differs: {error}") from error
    states = [
        json.loads((folder / "trainer.json").read_text()) for folder in (final, whole / "checkpoints" / final.name)
    ]
    check(states[0] == states[1], f"trainer.json differs: {states[0]}, not {states[1]}")
    compare_lines(run.run_dir, whole, "metrics.jsonl", range(1, STEPS + 1))
    if run.settings.evaluate:
        compare_lines(run.run_dir, whole, "eval.jsonl", None)
    check_leftovers(run)


def compare_lines(run_dir: Path, whole: Path, name: str, steps: range | None) -> None:
    read = []
    for folder in (run_dir, whole):
        try:
            lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        except (OSError, ValueError) as error:
            raise Failed(f"{folder / name}: {error}") from error
        read.append([{key: value for key, value in line.items() if key != "seconds"} for line in lines])
    found, expected = ([line["step"] for line in lines] for lines in read)
    check(found == expected, f"{name} holds the steps {found}, not {expected}")
    check(steps is None or found == list(steps), f"{name} of the reference holds the steps {found}")
    try:
        assert_same_metrics(*read)
    except AssertionError as error:
        raise Failed(f"{name} differs: {error}") from error


def check_leftovers(run: Run) -> None:
    unfinished = (".partial", ".deleting", ".building", ".tmp")
    left = [path for folder in (run.run_dir, run.cache) for path in folder.rglob("*") if path.suffix in unfinished]
    check(not left, f"left over: {', '.join(str(path.relative_to(run.folder)) for path in left)}")


class References:
    """Undisturbed runs, one for each number of ranks and ZeRO stage."""

    def __init__(self, runs: Runs, folder: Path):
        self.runs, self.folder = runs, folder

    def make(self, settings: Settings) -> Path:
        folder = self.folder / f"ranks_{settings.ranks}_zero_{settings.zero}"
        run = Run(self.runs, folder, Settings(settings.ranks, settings.zero, True, 1, True, 1))
        folder.mkdir(parents=True)
        finish(run)
        return run.run_dir

    def __call__(self, settings: Settings) -> Path:
        return self.folder / f"ranks_{settings.ranks}_zero_{settings.zero}" / "runs" / "run"
