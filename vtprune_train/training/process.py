"""The life of one rank's process: joining the others, training, and the ways to end."""

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
from vtprune_train.processes.output import keep_streams
from vtprune_train.processes.signals import BEFORE_TRAINING, STOP, exit_code, final_exit
from vtprune_train.training import distributed as ranks
from vtprune_train.training.checkpoint.lock import check_free, port_taken
from vtprune_train.training.engine.start import start_distributed
from vtprune_train.training.faults.non_finite import EXIT_STOPPED, TrainingError
from vtprune_train.training.faults.rank_failures import connect
from vtprune_train.training.faults.watchdog import Watchdog
from vtprune_train.training.loop.run import prepare
from vtprune_train.training.loop.trainer import Callback

log = logging.getLogger(__name__)

# The first is PyTorch's present name, the others are read too.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
GROWING_SEGMENTS = "expandable_segments:True"
EXIT_REFUSED = 2


class StopRequestError(Exception):
    """A signal before the first step, when there is nothing to save."""


def train(config: Config, callbacks: Sequence[Callback] = ()) -> int:
    """Train as one rank, with ``callbacks`` after those that every run has. Returns the exit code; does not return
    after a failure of any rank.
    """
    keep_streams()
    listens_for_this = STOP.listen()
    try:
        return _train(config, callbacks)
    finally:
        if listens_for_this:  # otherwise the process ends with this training
            STOP.restore()


def _train(config: Config, callbacks: Sequence[Callback]) -> int:
    faulthandler.enable()
    be_deterministic(config)
    set_allocator()
    device = _join(config)
    watchdog = Watchdog(connect())
    STOP.act = partial(_stop_before_training, watchdog)
    if ranks.rank() == 0:
        _note_restarts(config.train.max_restarts)
    try:
        try:
            trainer = prepare(config, device, watchdog, callbacks)
        except ValueError as error:
            log.debug("where it came from", exc_info=True)
            what = "the settings are wrong" if isinstance(error, ConfigError) else "cannot train"
            watchdog.fail(error, EXIT_REFUSED, final=True, shown=refusal(what, error))
        settings = config.train
        if config.data.workers:
            wait_for_server()
        ranks.barrier()  # a machine may index its data longer than another: that is no hang
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
        check_free(config.run_dir)  # most likely it is the same run, started twice
        port = os.environ["MASTER_PORT"]
        raise ConfigError(
            f"port {port} of {os.environ['MASTER_ADDR']}, where the ranks meet, is taken by another program (another "
            f"training?); give the launcher another one, such as --master_port {int(port) + 1}"
        ) from error


def set_allocator() -> None:
    """Let the CUDA allocator's segments grow, unless the environment configures it: no two micro-batches have the same
    shapes, which fragments segments of fixed size. PyTorch reads the variable when it first allocates on a GPU."""
    chosen = [f"{name}={os.environ[name]}" for name in ALLOCATOR_VARIABLES if name in os.environ]
    if not chosen:
        os.environ[ALLOCATOR_VARIABLES[0]] = GROWING_SEGMENTS
        chosen = [f"{ALLOCATOR_VARIABLES[0]}={GROWING_SEGMENTS} (set it yourself for another)"]
    if torch.cuda.is_available():
        log.info("CUDA allocator: %s", ", ".join(chosen))


def _stop_before_training(watchdog: Watchdog, number: int) -> NoReturn:
    shown = f"{signal.Signals(number).name} {BEFORE_TRAINING}"
    watchdog.fail(StopRequestError(shown), exit_code(number), final=True, shown=shown, terminated=True)


def _give_up(watchdog: Watchdog, error: Exception) -> NoReturn:
    if isinstance(error, TrainingError):  # of all ranks; resuming repeats the same bits, so it would come again
        ranks.told_by(0, error)
        watchdog.fail(error, EXIT_STOPPED, final=True, shown=refusal("training stopped", error))
    place = f"rank {ranks.rank()} on {socket.gethostname()} failed ({watchdog.place().where}):"
    watchdog.fail(error, 1, final=False, shown=f"{place}\n{''.join(traceback.format_exception(error)).rstrip()}")


def _note_restarts(wanted: int) -> None:
    """Say which restart this is, and whether ``train.max_restarts`` can be kept: only who started the ranks can."""
    done, most = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    if done:
        log.warning("restart %d of at most %d after a failure", done, most)
    if wanted and wanted != most:
        log.warning(
            "train.max_restarts=%d has no effect: what started this process restarts %s. Start with "
            "`vtprune launch`, or with torchrun --max_restarts %d",
            wanted, f"{most} times" if most else "nothing", wanted,
        )  # fmt: skip
