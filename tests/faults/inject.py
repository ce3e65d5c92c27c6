"""``train.py`` with a fault at a named moment of a save, or while a step's numbers are written; the production code has
no hooks for this.

Environment: ``FAULT`` names the moment, ``FAULT_RANK`` the rank (default 0), ``FAULT_STEP`` the checkpoint's step.
A kill is SIGKILL of the own process, as a scheduler or the kernel does.
"""

import errno
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vtprune_train.cli import train_main
from vtprune_train.training import checkpoint, manifest, saving
from vtprune_train.training.json_lines import JsonLines

FAULT, STEP = os.environ["FAULT"], int(os.environ["FAULT_STEP"])
HERE = os.environ.get("RANK", "0") == os.environ.get("FAULT_RANK", "0")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(path):
    return f"step_{STEP:08d}" in str(path)


def before(module, name, of=0):
    """Die when ``module.name`` is called for the step (its argument number ``of`` is a path)."""
    real = getattr(module, name)

    def dying(*given, **named):
        if at_step(given[of]):
            die()
        return real(*given, **named)

    setattr(module, name, dying)


class Shard:
    """A file in which something happens once ``limit`` bytes are written."""

    def __init__(self, file, path, limit, act):
        self.file, self.path, self.limit, self.act, self.written = file, path, limit, act, 0

    def write(self, data):
        if self.written + len(data) > self.limit and at_step(self.path):
            self.file.write(bytes(data)[: self.limit - self.written])
            self.file.flush()
            self.act()
        self.written += len(data)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def in_shard(act):
    real = saving.HashingFile

    class Broken(real):
        def __init__(self, file):
            super().__init__(Shard(file, file.name, 5000, act))

    saving.HashingFile = Broken


def disk_full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def lines_full():
    """The kernel writes the first bytes of the step's line of ``metrics.jsonl``, then refuses."""
    real = JsonLines.append

    def append(file, line, **named):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if file.path.name == "metrics.jsonl" and line["step"] == STEP:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file.path.stat().st_size + 20, before[1]))
        try:
            real(file, line, **named)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    JsonLines.append = append


def board_full():
    """From the step on TensorBoard's thread has no room."""
    from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

    real, append = LocalFileSystem.append, JsonLines.append

    def full(*given):
        disk_full()

    def begin(file, line, **named):
        LocalFileSystem.append = full if line["step"] >= STEP else real
        append(file, line, **named)

    JsonLines.append = begin


def while_deleting():
    real = shutil.rmtree

    def half(path, **named):
        if Path(path).suffix == ".deleting":
            for number, name in enumerate(manifest.files_in(Path(path))):
                if number % 2:
                    (Path(path) / name).unlink()
            die()
        return real(path, **named)

    manifest.shutil = type("Shutil", (), {"rmtree": staticmethod(half)})


def little_room():
    usage = shutil.disk_usage

    def small(path):
        total, used, _ = usage(path)
        return type(usage(path))(total, used, 1000)

    checkpoint.shutil = type("Shutil", (), {"rmtree": staticmethod(shutil.rmtree), "disk_usage": staticmethod(small)})


FAULTS = {
    "before_weights": lambda: before(checkpoint, "write_part"),
    "in_shard": lambda: in_shard(die),
    "before_manifest": lambda: before(manifest, "write_manifest"),
    "before_rename": lambda: before(manifest, "put_in_place"),
    "before_latest": lambda: before(manifest, "point_latest", of=1),
    "while_deleting": while_deleting,
    "disk_full": lambda: in_shard(disk_full),
    "little_room": little_room,
    "lines_full": lines_full,
    "board_full": board_full,
}

if __name__ == "__main__":
    if HERE:
        FAULTS[FAULT]()
    sys.exit(train_main())
