"""``vtprune launch``: torchrun with what the settings ask for (``train.max_restarts``), started on every machine.

torchrun starts all ranks again whenever one of them fails. Two kinds of end must not lead there: those that would only
repeat themselves (wrong settings, a loss that is not finite), and SIGTERM, which asks for the end. Ranks note such an
end in a file and return 0, and the launcher returns the noted code. SIGTERM to the launcher goes to the ranks, which
finish their step and save; torchrun alone would kill them after 30 seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtprune_train.config import Config
from vtprune_train.config_file import load_config

FINAL_FILE = "VTPRUNE_FINAL_FILE"
RANK_MODULE = "vtprune_train.cli"
EXIT_TERMINATED = 143
USAGE = "vtprune launch [torchrun options] --config FILE [key=value ...]"


def asked_to_stop() -> bool:
    """Whether the end was noted before this rank began: it was started again, although all is over."""
    note = os.environ.get(FINAL_FILE)
    return note is not None and Path(note).exists()


def final_exit(code: int) -> int:
    """What a rank returns for an end that a restart cannot mend: ``code``, unless the launcher wants it noted."""
    note = os.environ.get(FINAL_FILE)
    if note is None:
        return code
    Path(note).write_text(str(code))
    return 0


def launch(arguments: Sequence[str]) -> int:
    """Run all ranks of this machine; returns their exit code.

    Args:
        arguments: torchrun's own options (``--nproc_per_node``, ``--nnodes``, ``--rdzv_endpoint`` ...), then
            ``--config FILE`` and ``key=value`` settings.

    Raises:
        ValueError: no ``--config``, or settings that cannot be trained with.
    """
    options, training = split_arguments(arguments)
    command = [*torchrun_options(options, _settings(training)), "-m", RANK_MODULE, "train", *training]
    with tempfile.TemporaryDirectory(prefix="vtprune-") as folder:
        note = Path(folder) / "final"
        os.environ[FINAL_FILE] = str(note)
        # PyTorch would let a restart read the addresses of the dead ranks in the store it shares with them.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        signal.signal(signal.SIGTERM, _pass_on)
        code = _torchrun(command)
        return int(note.read_text()) if note.exists() else code


def _torchrun(command: list[str]) -> int:
    """The exit code of the rank that failed first, as a shell would say it; 0 if none did."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(command)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    return 0


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """torchrun's options, and what begins with ``--config``.

    Raises:
        ValueError: there is no ``--config``.
    """
    for position, argument in enumerate(arguments):
        if argument == "--config" or argument.startswith("--config="):
            return list(arguments[:position]), list(arguments[position:])
    raise ValueError(f"--config is missing; {USAGE}")


def torchrun_options(given: Sequence[str], config: Config) -> list[str]:
    """``given`` and what it leaves open: all GPUs of one machine, restarts as ``train.max_restarts`` says.

    Raises:
        ValueError: an option that the settings decide.
    """
    import torch

    names = {option.partition("=")[0].replace("-", "_").lstrip("_") for option in given if option.startswith("-")}
    if "max_restarts" in names:
        raise ValueError("--max_restarts is decided by train.max_restarts; give it as train.max_restarts=N")
    if "signals_to_handle" in names:
        raise ValueError("--signals_to_handle is decided by vtprune launch, which passes SIGTERM on to the ranks")
    options = [*given, "--max_restarts", str(config.train.max_restarts)]
    if "nnodes" not in names:
        options.append("--standalone")
    if "nproc_per_node" not in names:
        options += ["--nproc_per_node", "gpu" if torch.cuda.is_available() else "1"]
    return [*options, "--signals_to_handle", "SIGINT,SIGHUP,SIGQUIT"]


def _settings(training: Sequence[str]) -> Config:
    parser = argparse.ArgumentParser(prog="vtprune launch", usage=USAGE)
    parser.add_argument("--config", required=True)
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("overrides", nargs="*")
    parsed = parser.parse_intermixed_args(training)
    return load_config(parsed.config, parsed.overrides)


def _pass_on(*_: Any) -> None:
    """SIGTERM goes to the ranks alone, and torchrun waits for them to end by themselves; without ranks, to this one."""
    import psutil

    ranks = psutil.Process().children()
    if not ranks:
        raise SystemExit(EXIT_TERMINATED)
    final_exit(EXIT_TERMINATED)  # a rank that only just began dies of it, and must not be started again
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            rank.send_signal(signal.SIGTERM)
