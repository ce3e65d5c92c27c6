"""``vtprune launch``: torchrun with what the settings ask for (``train.max_restarts``), started on every machine.

torchrun starts all ranks again whenever one of them fails. Two kinds of end must not lead there: those that would only
repeat themselves (wrong settings, a loss that is not finite), and signals that ask for the end. Ranks note such an
end in a file and return 0, and the launcher returns the noted code. SIGINT, SIGTERM and SIGHUP to the launcher go to
the ranks, which finish their step and save; torchrun alone would kill them after 30 seconds. SIGQUIT ends all at once.
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

import psutil  # not where a signal is handled: another one may come in the middle of an import

from vtprune_train.config.errors import ConfigError
from vtprune_train.config.load import load_config
from vtprune_train.config.settings import Config
from vtprune_train.processes.launchers import announce
from vtprune_train.processes.output import keep_streams
from vtprune_train.processes.signals import (
    FINAL_FILE,
    LAUNCH_USAGE,
    STOPPING,
    asked_file,
    exit_code,
    ignore_signals,
    launcher_was_asked,
    listens,
    make_notes,
    note_code,
    noted,
)
from vtprune_train.training.checkpoint.lock import check_free, port_taken

RANK_MODULE = "vtprune_train.cli"


def launch(arguments: Sequence[str]) -> int:
    """Run all ranks of this machine; returns their exit code. ``arguments`` are torchrun's own options
    (``--nproc_per_node``, ``--nnodes``, ``--rdzv_endpoint`` ...), then ``--config FILE`` and ``key=value`` settings."""
    options, training = split_arguments(arguments)
    config = _settings(training)
    command = [*torchrun_options(options, config), "-m", RANK_MODULE, "train", *training]
    if _value_of(options, "nnodes") in (None, "1", "1:1"):  # else another machine may have started this very job
        check_free(config.run_dir)
    keep_streams()
    announce()
    with tempfile.TemporaryDirectory(prefix="vtprune-") as folder:
        note = make_notes(Path(folder))
        os.environ[FINAL_FILE] = str(note)
        # PyTorch would let a restart read the addresses of the dead ranks in the store it shares with them.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        handlers = {number: signal.getsignal(number) for number in STOPPING}
        for number, handler in handlers.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, _pass_on)
        try:
            code = _torchrun(command, config)
            final = noted(note)
            return code if final is None else final
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            del os.environ[FINAL_FILE]  # it is for ranks


def _torchrun(command: list[str], config: Config) -> int:
    """The exit code of the rank that failed first, as a shell would say it; 0 if none did."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(command)
    except ChildFailedError as error:
        if not launcher_was_asked():
            print(error, file=sys.stderr)
        code = error.get_first_failure()[1].exitcode
        asked = noted(asked_file(os.environ[FINAL_FILE]))
        if asked is not None and code == -signal.SIGTERM:  # it was not listening yet
            return asked
        return code if code > 0 else exit_code(-code)
    except SignalException as error:
        return exit_code(error.sigval)
    except Exception as error:
        if not port_taken(error):
            raise
        check_free(config.run_dir)
        place = _value_of(command, "rdzv_endpoint", "master_port")
        raise ConfigError(
            f"the port of --rdzv_endpoint or --master_port ({place}) is taken by another program; give another one, or "
            "leave the option out on one machine"
        ) from error
    return 0


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """torchrun's options, and what begins with ``--config``."""
    for position, argument in enumerate(arguments):
        if argument == "--config" or argument.startswith("--config="):
            return list(arguments[:position]), list(arguments[position:])
    raise ValueError(f"--config is missing; {LAUNCH_USAGE}")


def torchrun_options(given: Sequence[str], config: Config) -> list[str]:
    """``given`` and what it leaves open: all GPUs of one machine, restarts as ``train.max_restarts`` says."""
    import torch

    names = {_name(option) for option in given if option.startswith("-")}
    if "max_restarts" in names:
        raise ValueError("--max_restarts is decided by train.max_restarts; give it as train.max_restarts=N")
    if "signals_to_handle" in names:
        raise ValueError("--signals_to_handle is decided by vtprune launch, which passes signals on to the ranks")
    options = [*given, "--max_restarts", str(config.train.max_restarts)]
    if not names & {"nnodes", "standalone", "master_port", "rdzv_endpoint"}:
        options.append("--standalone")
    if "nproc_per_node" not in names:
        options += ["--nproc_per_node", "gpu" if torch.cuda.is_available() else "1"]
    return [*options, "--signals_to_handle", "SIGQUIT"]


def _name(option: str) -> str:
    return option.partition("=")[0].replace("-", "_").lstrip("_")


def _value_of(options: Sequence[str], *names: str) -> str | None:
    """What the first of the options ``names`` that is there was given, as ``--name VALUE`` or ``--name=VALUE``."""
    for position, option in enumerate(options):
        if option.startswith("-") and _name(option) in names:
            _, equals, value = option.partition("=")
            return value if equals else (*options, "")[position + 1]
    return None


def _settings(training: Sequence[str]) -> Config:
    parser = argparse.ArgumentParser(prog="vtprune launch", usage=LAUNCH_USAGE)
    parser.add_argument("--config", required=True)
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("overrides", nargs="*")
    parsed = parser.parse_intermixed_args(training)
    return load_config(parsed.config, parsed.overrides)


def _pass_on(number: int, frame: Any) -> None:
    """A signal goes to the ranks alone, and torchrun waits for them to end by themselves; without ranks, to this
    process. The first one is noted, so that a rank that only just began dies of it and is not started again."""
    asked = asked_file(os.environ[FINAL_FILE])
    if noted(asked) is None:
        note_code(asked, exit_code(number))
    ranks = psutil.Process().children()
    if not ranks:
        ignore_signals()
        raise SystemExit(noted(asked) or exit_code(number))
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            # Before a rank listens, Python answers SIGINT by a traceback.
            rank.send_signal(number if listens(rank.pid) else signal.SIGTERM)
