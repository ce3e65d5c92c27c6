"""What a process logs to the console: plain lines with the time, each warning of a library once."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FORMAT = "%(asctime)s %(levelname)s %(message)s"
TIME = "%Y-%m-%d %H:%M:%S"


def start_logging() -> None:
    """Log to standard error: on rank 0 this package from INFO on, everything else from WARNING on."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.WARNING, format=FORMAT, datefmt=TIME, handlers=[_StderrHandler()])
    logging.getLogger("vtprune_train").setLevel(logging.WARNING if rank else logging.INFO)
    if rank:  # every rank opens the same index; rank 0 logs about it
        logging.getLogger("vtprune_train.data.index").setLevel(logging.ERROR)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Context that shows warnings of libraries once, on rank 0 alone, and hides those that a user cannot act on. Enter
    it after PyTorch and DeepSpeed are imported, which set up their own loggers."""
    loggers = [logging.getLogger(name) for name in ("py.warnings", "DeepSpeed", "transformers")]
    levels, show, once = [logger.level for logger in loggers], warnings.showwarning, _OncePerMessage()
    logging.captureWarnings(True)
    captures = warnings.showwarning is not show  # else the caller already captures them
    for logger in loggers[:2]:
        logger.addFilter(once)
    if int(os.environ.get("RANK", "0")):
        for logger in loggers:
            logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for logger in loggers[:2]:
            logger.removeFilter(once)
        if captures:
            logging.captureWarnings(False)


class _StderrHandler(logging.StreamHandler[Any]):
    """Writes to what ``sys.stderr`` is at the time: :mod:`vtprune_train.processes.output` replaces it."""

    @property
    def stream(self) -> Any:  # type: ignore[override]
        return sys.stderr

    @stream.setter
    def stream(self, stream: Any) -> None:
        """Has no effect; the base class sets it."""


class _OncePerMessage(logging.Filter):
    """Passes each warning once, and neither those about deprecated PyTorch functions that DeepSpeed calls, nor the one
    about optimizers that DeepSpeed does not list."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        known = message in self._seen or ("`torch.distributed." in message and "deprecated" in message)
        known = known or "You are using ZeRO with an untested optimizer" in message
        self._seen.add(message)
        return not known
