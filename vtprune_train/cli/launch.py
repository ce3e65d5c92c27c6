"""``vtprune launch``: run torchrun with options derived from the settings (``train.max_restarts``); start it on every
node.

torchrun starts all ranks again whenever one of them fails. Two cases must not trigger a restart: deterministic failures
(invalid settings, non-finite loss) and termination signals. In these cases ranks record the exit code in a file and
return 0, and the launcher returns the recorded code. The launcher forwards SIGINT, SIGTERM and SIGHUP to the ranks,
which finish their step and save; plain torchrun would kill them after 30 seconds. SIGQUIT stops everything immediately.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil  # import here, not in the signal handler, where a second signal could interrupt the import

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
# torchrun's log messages that users cannot act on: for each logger, a part of the message.
NOISE = {
    "torch.distributed.run": "OMP_NUM_THREADS",
    "torch.distributed.elastic.multiprocessing.errors.error_handler": "no error file defined for parent",
}
log = logging.getLogger(__name__)


def launch(arguments: Sequence[str]) -> int:
    """Run all ranks of this machine; returns their exit code. ``arguments`` are torchrun's own options
    (``--nproc_per_node``, ``--nnodes``, ``--rdzv_endpoint`` ...), then ``--config FILE`` and ``key=value`` settings."""
    options, training = split_arguments(arguments)
    config = _settings(training)
    command = [*torchrun_options(options, config), "-m", RANK_MODULE, "train", *training]
    if _value_of(options, "nnodes") in (None, "1", "1:1"):  # else another machine may have started this job
        check_free(config.run_dir)
    keep_streams()
    announce()
    with tempfile.TemporaryDirectory(prefix="vtprune-") as folder:
        note = make_notes(Path(folder))
        os.environ[FINAL_FILE] = str(note)
        # Otherwise a restart would read stale addresses of dead ranks from the shared store.
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
            del os.environ[FINAL_FILE]  # only meant for ranks


def _torchrun(command: list[str], config: Config) -> int:
    """Return the shell-style exit code of the first failed rank, or 0."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    for name in NOISE:
        logging.getLogger(name).addFilter(_is_useful)
    try:
        torchrun(command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if not launcher_was_asked():  # the rank has printed what went wrong
            ended = f"ended with exit code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
            log.error("rank %d (process %d) was the first to fail: it %s", rank, failure.pid, ended)
        asked = noted(asked_file(os.environ[FINAL_FILE]))
        if asked is not None and code == -signal.SIGTERM:  # its signal handler was not installed yet
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
            f"port {place} (--rdzv_endpoint or --master_port) is already in use; choose another one, or omit the "
            "option on a single machine"
        ) from error
    return 0


def _is_useful(record: logging.LogRecord) -> bool:
    return NOISE[record.name] not in record.getMessage()


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into torchrun options and everything from ``--config`` on."""
    for position, argument in enumerate(arguments):
        if argument == "--config" or argument.startswith("--config="):
            return list(arguments[:position]), list(arguments[position:])
    raise ValueError(f"--config is missing; {LAUNCH_USAGE}")


def torchrun_options(options: Sequence[str], config: Config) -> list[str]:
    """Add defaults to torchrun options: all GPUs of one machine, and ``train.max_restarts`` restarts."""
    import torch

    names = {_name(option) for option in options if option.startswith("-")}
    if "max_restarts" in names:
        raise ValueError("--max_restarts is not supported; set train.max_restarts=N instead")
    if "signals_to_handle" in names:
        raise ValueError("--signals_to_handle is not supported: vtprune launch forwards signals to the ranks itself")
    defaults = ["--max_restarts", str(config.train.max_restarts), "--signals_to_handle", "SIGQUIT"]
    if not names & {"nnodes", "standalone", "master_port", "rdzv_endpoint"}:
        defaults.append("--standalone")
    if "nproc_per_node" not in names:
        defaults += ["--nproc_per_node", "gpu" if torch.cuda.is_available() else "1"]
    return [*options, *defaults]


def _name(option: str) -> str:
    return option.partition("=")[0].replace("-", "_").lstrip("_")


def _value_of(options: Sequence[str], *names: str) -> str | None:
    """Return the value of the first option in ``names`` that is present (``--name VALUE`` or ``--name=VALUE``)."""
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
    """Forward signals to the ranks only and let torchrun wait for them; without ranks, handle them in this process. The
    first signal is recorded so that a rank that is just starting exits and is not restarted."""
    asked = asked_file(os.environ[FINAL_FILE])
    if noted(asked) is None:
        note_code(asked, exit_code(number))
    ranks = psutil.Process().children()
    if not ranks:
        ignore_signals()
        raise SystemExit(noted(asked) or exit_code(number))
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            # Before a rank has installed its handler, SIGINT would raise KeyboardInterrupt with a traceback.
            rank.send_signal(number if listens(rank.pid) else signal.SIGTERM)
