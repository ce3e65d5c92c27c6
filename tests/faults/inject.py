"""``train.py`` with a fault at a named moment; the production code has no hooks for this.

Environment: ``FAULT`` names the moment (``MOMENTS``; ``none``: no fault), ``FAULT_ACT`` what happens then (``ACTS``; a
kill if unset), ``FAULT_RANK`` the rank to which it happens (default 0; ``any``: each that comes there), ``FAULT_STEP``
the step from which on the moment counts. ``FAULT_DISK`` is a file system of its own that holds the run: ``fill`` fills
it, and without one every file that is opened for writing below ``FAULT_FOLDER`` is refused from then on. A kill is
SIGKILL, as a scheduler or the kernel sends it. The fault happens once; a line that begins with ``FAULT`` says so.
"""

import contextlib
import errno
import itertools
import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepspeed.runtime.engine import DeepSpeedEngine

from vtprune_train.cli import train_main
from vtprune_train.data.load import workers
from vtprune_train.data.measure import Measure
from vtprune_train.data.sources import json_files
from vtprune_train.files import disk
from vtprune_train.training.checkpoint import folder, manifest, resume, writing
from vtprune_train.training.checkpoint.json_lines import JsonLines
from vtprune_train.training.loop import evaluate
from vtprune_train.training.loop.callbacks import evaluation, metrics, plot
from vtprune_train.training.loop.trainer import Trainer

FAULT, ACT = os.environ.get("FAULT", "none"), os.environ.get("FAULT_ACT", "kill")
STEP = int(os.environ.get("FAULT_STEP", "1"))
HERE = os.environ.get("FAULT_RANK", "0") in ("any", os.environ.get("RANK", "0"))
PIECE_BYTES = 1200  # several pieces of a tiny data file
_happened = threading.Event()


# ---- what happens -----------------------------------------------------------------------------------------------


def act() -> None:
    """The fault, once."""
    if _happened.is_set():
        return
    _happened.set()
    print(f"\nFAULT {ACT} at {FAULT}", file=sys.stderr, flush=True)
    ACTS[ACT]()


def signal_all(number: int) -> None:
    """To every process of the run but its launcher: all ranks and workers."""
    group = os.getpgid(0)
    for entry in Path("/proc").glob("[0-9]*"):
        process = int(entry.name)
        with contextlib.suppress(ProcessLookupError):
            if process not in (group, os.getpid()) and os.getpgid(process) == group:
                os.kill(process, number)
    os.kill(os.getpid(), number)


def kill_worker() -> None:
    living = [process for pool in list(workers._LIVE) for process in pool.processes]
    os.kill(living[0].pid, signal.SIGKILL)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill() -> None:
    """Fill the file system for real, or refuse every file that is opened for writing from now on."""
    if disk := os.environ.get("FAULT_DISK"):
        with (Path(disk) / "filler").open("wb") as filler:
            for size in (1 << 20, 1 << 12):
                with contextlib.suppress(OSError):
                    while True:
                        os.posix_fallocate(filler.fileno(), os.fstat(filler.fileno()).st_size, size)
        return
    folder = os.environ["FAULT_FOLDER"]

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR) and str(arguments[0]).startswith(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    sys.addaudithook(refuse)
    if FAULT == "in_shard":
        disk_full()


ACTS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "kill_worker": kill_worker,
    "kill_group": lambda: os.killpg(os.getpgid(0), signal.SIGKILL),
    "kill_launcher": lambda: os.kill(os.getppid(), signal.SIGKILL),
    "sigterm": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "sigterm_all": lambda: signal_all(signal.SIGTERM),
    "sigint": lambda: os.kill(os.getpid(), signal.SIGINT),
    "sigint_all": lambda: signal_all(signal.SIGINT),
    "fill": fill,
    "disk_full": disk_full,
}


# ---- when -------------------------------------------------------------------------------------------------------


def always(*_: Any) -> bool:
    return True


def step_of_path(number: int) -> Callable[..., bool]:
    """Whether the argument ``number``, a path in a checkpoint, is of the step or a later one."""
    return lambda *given: is_due(given[number])


def is_due(path: Any) -> bool:
    found = [part for part in Path(path).parts if part.startswith("step_")]
    return bool(found) and int(found[0].removeprefix("step_").partition(".")[0]) >= STEP


def step_begins(trainer: Trainer, *_: Any) -> bool:
    return trainer.state.step + 1 >= STEP


def step_ended(trainer: Trainer, *_: Any) -> bool:
    return trainer.state.step >= STEP


def callback_step_ended(_: Any, trainer: Trainer, *rest: Any) -> bool:
    return step_ended(trainer)


def before(owner: Any, name: str, when: Callable[..., bool] = always) -> None:
    """Act before ``owner.name`` is called, if ``when`` says so of its arguments."""
    patch(owner, name, when, first=True)


def after(owner: Any, name: str, when: Callable[..., bool] = always) -> None:
    patch(owner, name, when, first=False)


def patch(owner: Any, name: str, when: Callable[..., bool], first: bool) -> None:
    real = getattr(owner, name)

    def patched(*given: Any, **named: Any) -> Any:
        if first and when(*given):
            act()
        result = real(*given, **named)
        if not first and when(*given):
            act()
        return result

    setattr(owner, name, patched)


def opening(*parts: str) -> None:
    """Act when a file whose path holds all ``parts`` is opened for writing, or such a folder made."""

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.mkdir" or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            path = str(arguments[0])
            if all(part in path for part in parts):
                act()

    sys.addaudithook(look)


class Shard:
    """A file in which something happens once ``limit`` bytes are written."""

    def __init__(self, file: Any, limit: int):
        self.file, self.limit, self.written = file, limit, 0

    def write(self, data: Any) -> int:
        if self.written + len(data) > self.limit and is_due(self.file.name) and not _happened.is_set():
            self.file.write(bytes(data)[: self.limit - self.written])
            self.file.flush()
            act()
        self.written += len(data)
        return self.file.write(data)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def in_shard() -> None:
    class Broken(writing.HashedFile):
        def __init__(self, path: Path):
            super().__init__(path)
            self._file = Shard(self._file, 5000)

    writing.HashedFile = Broken


def in_backward() -> None:
    """Within autograd, at its beginning."""
    real = DeepSpeedEngine.backward

    def backward(self: Any, loss: Any, *given: Any, **named: Any) -> Any:
        if self.global_steps + 1 >= STEP:
            loss.register_hook(lambda _: act())
        return real(self, loss, *given, **named)

    DeepSpeedEngine.backward = backward


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


def while_deleting() -> None:
    real = shutil.rmtree

    def half(path: Any, **named: Any) -> None:
        if Path(path).suffix == ".deleting" and not _happened.is_set():
            for number, name in enumerate(manifest.files_in(Path(path))):
                if number % 2:
                    (Path(path) / name).unlink()
            act()
        real(path, **named)

    disk.shutil = type("Shutil", (), {"rmtree": staticmethod(half)})


def little_room() -> None:
    usage = shutil.disk_usage

    def small(path: Any) -> Any:
        total, used, _ = usage(path)
        return type(usage(path))(total, used, 1000)

    folder.shutil = type("Shutil", (), {"rmtree": staticmethod(shutil.rmtree), "disk_usage": staticmethod(small)})


def disk_full_in_shard() -> None:
    global ACT
    ACT = "disk_full"
    in_shard()


def later_piece() -> None:
    """In the second piece of the index."""
    calls = itertools.count(1)
    before(Measure, "__call__", lambda *_: next(calls) == 2)


START: dict[str, Callable[[], Any]] = {
    "in_tokenizer": lambda: opening("/run/tokenizer", ".json"),
    "in_piece": later_piece,
    "assembling": lambda: opening(".building/table"),
    "writing_index": lambda: opening(".building", ".npy"),
    "selecting": lambda: opening("selection", "rows.bin"),
    "loading": lambda: before(resume, "load"),
    "after_loading": lambda: after(resume, "load"),
}
IN_STEP: dict[str, Callable[[], Any]] = {
    "before_forward": lambda: before(Trainer, "_forward_backward", step_begins),
    "in_backward": in_backward,
    "before_optimizer": lambda: before(Trainer, "_optimizer_step", step_begins),
    "after_optimizer": lambda: after(Trainer, "_optimizer_step", step_begins),
    "before_metrics": lambda: before(metrics.Metrics, "on_step", callback_step_ended),
    "after_metrics": lambda: after(metrics.Metrics, "on_step", callback_step_ended),
    "in_evaluation": lambda: before(evaluate, "_sums"),
    "after_evaluation": lambda: after(evaluation.Evaluation, "_evaluate"),
}
IN_SAVE: dict[str, Callable[[], Any]] = {
    "before_weights": lambda: before(folder, "write_file", step_of_path(0)),
    "in_shard": in_shard,
    "before_export": lambda: before(folder, "write_export", step_of_path(3)),
    "after_export": lambda: after(folder, "write_export", step_of_path(3)),
    "before_manifest": lambda: before(manifest, "write_manifest", step_of_path(0)),
    "before_rename": lambda: before(manifest, "put_in_place", step_of_path(0)),
    "before_latest": lambda: before(manifest, "point_latest", step_of_path(1)),
    "while_deleting": while_deleting,
}
END: dict[str, Callable[[], Any]] = {
    "before_last_save": lambda: before(Trainer, "save", lambda trainer: trainer.state.step >= trainer.total_steps),
    "drawing": lambda: before(plot, "plot_training"),
}
MOMENTS = {**START, **IN_STEP, **IN_SAVE, **END}
FAULTS = {
    **MOMENTS,
    "disk_full": disk_full_in_shard,
    "lines_full": lines_full,
    "board_full": board_full,
    "little_room": little_room,
    "none": lambda: None,
}

if __name__ == "__main__":
    json_files.PIECE_BYTES = PIECE_BYTES
    if HERE:
        FAULTS[FAULT]()
    sys.exit(train_main())
