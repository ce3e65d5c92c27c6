"""Lifecycle of a rank process: initialization, training and shutdown."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import traceback
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

import torch

from vtprune_train.config.errors import ConfigError, refusal
from vtprune_train.config.settings import Config
from vtprune_train.data.load.workers import wait_for_server
from vtprune_train.models.forward.kernels import be_deterministic
from vtprune_train.processes.console import quiet_libraries
from vtprune_train.processes.output import keep_streams
from vtprune_train.processes.signals import BEFORE_TRAINING, STOP, exit_code, final_exit
from vtprune_train.training import distributed as ranks
from vtprune_train.training.checkpoint.lock import check_free, port_taken
from vtprune_train.training.engine.start import start_distributed
from vtprune_train.training.faults.non_finite import EXIT_STOPPED, TrainingError
from vtprune_train.training.faults.rank_failures import connect
from vtprune_train.training.faults.watchdog import Watchdog
from vtprune_train.training.loop.callback import Callback
from vtprune_train.training.loop.run import prepare

log = logging.getLogger(__name__)

# The first is PyTorch's current name; it reads the others too.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
GROWING_SEGMENTS = "expandable_segments:True"
EXIT_REFUSED = 2


class StopRequestError(Exception):
    """Raised when a stop signal arrives before the first step, when there is nothing to save."""


def train(config: Config, callbacks: Sequence[Callback] = ()) -> int:
    """Run training on this rank with ``callbacks`` added after the standard ones. Returns the exit code; never returns
    if any rank fails.
    """
    keep_streams()
    listens_for_this = STOP.listen()
    try:
        return _train(config, callbacks)
    finally:
        if listens_for_this:  # otherwise the command line was listening, and exits after training
            STOP.restore()


def _train(config: Config, callbacks: Sequence[Callback]) -> int:
    faulthandler.enable()
    be_deterministic(config)
    set_allocator()
    device = _join(config)
    with quiet_libraries():
        return _run(config, callbacks, device)


def _run(config: Config, callbacks: Sequence[Callback], device: torch.device) -> int:
    watchdog = Watchdog(connect())
    STOP.act = partial(_stop_before_training, watchdog)
    if ranks.rank() == 0:
        _note_restarts(config.train.max_restarts)
    try:
        try:
            trainer = prepare(config, device, watchdog, callbacks)
        except ValueError as error:
            log.debug("traceback", exc_info=True)
            what = "the settings are wrong" if isinstance(error, ConfigError) else "cannot train"
            watchdog.fail(error, EXIT_REFUSED, final=True, message=refusal(what, error))
        settings = config.train
        if config.data.workers:
            wait_for_server()
        ranks.barrier()  # not a hang: indexing may take longer on some machines
        watchdog.watch(config.run_dir / "watchdog", settings.watchdog_timeout, settings.collective_timeout)
        STOP.train()
        code = trainer.fit()
        STOP.end()
        ranks.shut_down()
    except Exception as error:
        _give_up(watchdog, error)
    watchdog.close()
    return final_exit(code) if code else 0


def _join(config: Config) -> torch.device:
    """Join the process group; returns this rank's device."""
    try:
        return start_distributed(config.train.collective_timeout)
    except Exception as error:
        if not port_taken(error):
            raise
        check_free(config.run_dir)  # most likely the same run was started twice
        port = os.environ["MASTER_PORT"]
        raise ConfigError(
            f"port {port} of {os.environ['MASTER_ADDR']}, where the ranks meet, is already in use (by another run?); "
            f"give the launcher another one, for example --master_port {int(port) + 1}"
        ) from error


def set_allocator() -> None:
    """Enable expandable segments in the CUDA allocator unless configured by the environment: micro-batch shapes always
    differ, which fragments fixed-size segments. PyTorch reads the variable when it first allocates on a GPU."""
    variables = [f"{name}={os.environ[name]}" for name in ALLOCATOR_VARIABLES if name in os.environ]
    if not variables:
        os.environ[ALLOCATOR_VARIABLES[0]] = GROWING_SEGMENTS
        variables = [f"{ALLOCATOR_VARIABLES[0]}={GROWING_SEGMENTS} (set the variable yourself to override)"]
    if torch.cuda.is_available():
        log.info("CUDA allocator: %s", ", ".join(variables))


def _stop_before_training(watchdog: Watchdog, number: int) -> NoReturn:
    message = f"{signal.Signals(number).name} {BEFORE_TRAINING}"
    watchdog.fail(StopRequestError(message), exit_code(number), final=True, message=message, terminated=True)


def _give_up(watchdog: Watchdog, error: Exception) -> NoReturn:
    if isinstance(error, TrainingError):  # the same on all ranks; a restart would fail in the same way
        ranks.raised_on(0, error)
        watchdog.fail(error, EXIT_STOPPED, final=True, message=refusal("training stopped", error))
    place = f"rank {ranks.rank()} on {socket.gethostname()} failed ({watchdog.place().where}):"
    watchdog.fail(error, 1, final=False, message=f"{place}\n{''.join(traceback.format_exception(error)).rstrip()}")


def _note_restarts(max_restarts: int) -> None:
    """Log the restart count, and warn if ``train.max_restarts`` cannot be honored (only the launcher can restart
    ranks)."""
    done, most = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    if done:
        log.warning("restart %d of at most %d after a failure", done, most)
    if max_restarts and max_restarts != most:
        log.warning(
            "train.max_restarts=%d has no effect: the launcher restarts the ranks %d times. Start with "
            "`vtprune launch`, or with torchrun --max_restarts %d",
            max_restarts, most, max_restarts,
        )  # fmt: skip
