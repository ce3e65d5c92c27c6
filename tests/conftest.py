"""Tests run offline and on a CPU."""

import logging
import os
import signal

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Two test processes share the cores: more threads wait for each other, and take twenty times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("repeatable", derandomize=True, print_blob=True)
settings.load_profile("repeatable")
for _number in (signal.SIGINT, signal.SIGHUP):  # which `make test &` and `nohup` ignore, for every child as well
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="module")
def _levels_of_loggers():
    """A command run in this process sets how much is logged; the next file finds it as it was."""
    loggers = [logging.getLogger(name) for name in ("vtprune_train", "vtprune_train.data.index")]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)
