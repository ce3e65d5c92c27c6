"""The launchers above this process: whether they are still there.

A launcher that is killed leaves its ranks to train on, with nobody to stop them. They look for it instead: who is above
them is recorded at their start, by command line. A shell, ``nohup``, ``tmux`` or a scheduler is no launcher: their end
changes nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LAUNCHER = "VTPRUNE_LAUNCHER"  # process and start of `vtprune launch`, for its ranks
SCRIPTS = {"torchrun", "deepspeed", "deepspeed.pt", "ds", "accelerate", "accelerate-launch"}
MODULES = {
    "torch.distributed.run",
    "torch.distributed.launch",
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
    "accelerate.commands.launch",
    "accelerate.commands.accelerate_cli",
}
OURS = {"vtprune", "vtprune_train.cli"}
THEIRS = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_SIZE": "deepspeed"}  # variables that ranks get from them
WITH_VALUE = ("-W", "-X")  # options of Python that take the next word
ENDED = ("Z", "X")  # states: a zombie, dead


@dataclass(frozen=True)
class Launcher:
    """A process that started ranks; ``started`` (clock ticks since boot) tells it from a later one with its number."""

    name: str
    pid: int
    started: int

    def __str__(self) -> str:
        return f"{self.name} (process {self.pid})" if self.pid else self.name

    def is_alive(self) -> bool:
        try:
            process = _process(self.pid)
        except OSError:  # it cannot be told: no file can be opened, or /proc shows it no more
            return True
        return process is not None and process.started == self.started and process.state not in ENDED


@dataclass(frozen=True)
class _Process:
    parent: int
    state: str
    started: int


def _process(pid: int) -> _Process | None:
    """From ``/proc/PID/stat`` (not a wall-clock time, which moves when the clock is set); ``None``: there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the name before may hold anything
    return _Process(parent=int(fields[1]), state=fields[0], started=int(fields[19]))


def announce() -> None:
    """Tell the ranks that this process is going to start that it is their launcher."""
    this = _process(os.getpid())
    if this is not None:
        os.environ[LAUNCHER] = f"{os.getpid()} {this.started}"


def launchers_above() -> list[Launcher]:
    """The launchers among this process's ancestors, the nearest first; those of other users may not be seen, and one
    that is gone already has the number 0."""
    launchers = []
    pid = os.getppid()
    python = False
    with contextlib.suppress(PermissionError):  # /proc mounted with hidepid=1, as clusters do
        while pid > 0 and (process := _process(pid)) is not None:
            command = _command(pid)
            name = launcher_name(command)
            if name is not None:
                launchers.append(Launcher(name, pid, process.started))
            python |= _is_python(command)
            pid = process.parent
    announced = os.environ.get(LAUNCHER)
    if announced is not None:
        launcher = Launcher("vtprune launch", *map(int, announced.split()))
        if launcher.pid not in [above.pid for above in launchers]:
            launchers.append(launcher)
    # A launcher in another container cannot be seen. Where no Python is above this process either (all launchers are,
    # unknown ones too), its launcher was killed before this process could look.
    is_here = os.getppid() > 0 and os.getsid(0) > 0
    if not launchers and not python and is_here:
        launchers = [Launcher(name, 0, 0) for variable, name in THEIRS.items() if variable in os.environ][:1]
    return launchers


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except (FileNotFoundError, ProcessLookupError):
        return []


def launcher_name(command: Sequence[str]) -> str | None:
    """What a command line runs, if that is a launcher: ``python bin/torchrun``, ``python -m torch.distributed.run``."""
    words = list(command)
    if _is_python(words):
        words.pop(0)
        while words and words[0].startswith("-") and words[0] not in ("-m", "-c"):
            del words[: 2 if words[0] in WITH_VALUE else 1]
    if words[:1] == ["-m"] and len(words) > 1:
        name, given = words[1], words[2:]
        return f"python -m {name}" if name in MODULES else _ours(name, given)
    if not words:
        return None
    name = Path(words[0]).name
    return name if name in SCRIPTS else _ours(name, words[1:])


def _is_python(command: Sequence[str]) -> bool:
    return bool(command) and Path(command[0]).name.startswith(("python", "pypy"))


def _ours(name: str, given: Sequence[str]) -> str | None:
    return "vtprune launch" if name in OURS and given[:1] == ["launch"] else None
