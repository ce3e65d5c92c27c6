"""Launchers among the ancestors of this process, and whether they are alive.

Ranks whose launcher was killed would train on with nobody to stop them. So each rank records its launchers at its
start, recognized by their command lines, and checks that they are alive. Shells, ``nohup``, ``tmux`` and schedulers are
not launchers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LAUNCHER = "VTPRUNE_LAUNCHER"  # set for the ranks: process id and start time of `vtprune launch`
SCRIPTS = {"torchrun", "deepspeed", "deepspeed.pt", "ds", "accelerate", "accelerate-launch"}
MODULES = {
    "torch.distributed.run",
    "torch.distributed.launch",
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
    "accelerate.commands.launch",
    "accelerate.commands.accelerate_cli",
}
VTPRUNE = {"vtprune", "vtprune_train.cli"}
VARIABLES = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_SIZE": "deepspeed"}  # environment variables that they set
WITH_VALUE = ("-W", "-X")  # Python options that take an argument
ENDED = ("Z", "X")  # states: a zombie, dead


@dataclass(frozen=True)
class Launcher:
    """A process that started ranks. ``started`` (clock ticks since boot) distinguishes it from a later process with the
    same id."""

    name: str
    pid: int
    started: int

    def __str__(self) -> str:
        return f"{self.name} (process {self.pid})" if self.pid else self.name

    def is_alive(self) -> bool:
        try:
            process = _process(self.pid)
        except OSError:  # unknown: no file can be opened, or /proc hides the process
            return True
        return process is not None and process.started == self.started and process.state not in ENDED


@dataclass(frozen=True)
class _Process:
    parent: int
    state: str
    started: int


def _process(pid: int) -> _Process | None:
    """Read ``/proc/PID/stat``; ``None`` if the process does not exist. Ticks since boot ignore clock changes."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the process name before may contain spaces and parentheses
    return _Process(parent=int(fields[1]), state=fields[0], started=int(fields[19]))


def announce() -> None:
    """Announce this process as the launcher of the ranks that it starts."""
    this = _process(os.getpid())
    if this is not None:
        os.environ[LAUNCHER] = f"{os.getpid()} {this.started}"


def launchers_above() -> list[Launcher]:
    """Launchers among the ancestors of this process, nearest first. Those of other users may be invisible; one that has
    already exited gets process id 0."""
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
    # A launcher in another container is invisible. All launchers, including unknown ones, are Python processes: if no
    # ancestor is one, the launcher was killed before this process looked for it.
    is_here = os.getppid() > 0 and os.getsid(0) > 0
    if not launchers and not python and is_here:
        launchers = [Launcher(name, 0, 0) for variable, name in VARIABLES.items() if variable in os.environ][:1]
    return launchers


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except (FileNotFoundError, ProcessLookupError):
        return []


def launcher_name(command: Sequence[str]) -> str | None:
    """Name of the launcher that a command line runs, such as ``python -m torch.distributed.run``; ``None`` if none."""
    words = list(command)
    if _is_python(words):
        words.pop(0)
        while words and words[0].startswith("-") and words[0] not in ("-m", "-c"):
            del words[: 2 if words[0] in WITH_VALUE else 1]
    if words[:1] == ["-m"] and len(words) > 1:
        name, arguments = words[1], words[2:]
        return f"python -m {name}" if name in MODULES else _vtprune_launch(name, arguments)
    if not words:
        return None
    name = Path(words[0]).name
    return name if name in SCRIPTS else _vtprune_launch(name, words[1:])


def _is_python(command: Sequence[str]) -> bool:
    return bool(command) and Path(command[0]).name.startswith(("python", "pypy"))


def _vtprune_launch(name: str, arguments: Sequence[str]) -> str | None:
    return "vtprune launch" if name in VTPRUNE and arguments[:1] == ["launch"] else None
