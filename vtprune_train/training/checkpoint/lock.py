"""A lock that allows one training job per run folder."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from pathlib import Path

LOCK = "run.lock"
FLOCK = "hhqqi"  # struct flock of Linux: type, whence, start, length, process


def hold_run(run_dir: Path) -> int:
    """Lock the run folder until this process ends. Only rank 0 calls this, before it changes anything.

    A POSIX record lock: the kernel releases it when the process ends, even after SIGKILL; forked processes do not
    inherit it; NFS (version 4, or 3 with its lock daemon) shares it with other machines.

    Returns:
        A file descriptor; closing it releases the lock.

    Raises:
        ValueError: another process holds the lock, or the file system does not support locks.
    """
    path = run_dir / LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # closing any descriptor releases the lock
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if not isinstance(error, BlockingIOError | PermissionError):
            raise ValueError(
                f"{path} cannot be locked ({error}); choose a run.output_dir on a file system that supports locks"
            ) from error
        raise _in_use(run_dir) from error
    os.ftruncate(descriptor, 0)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {started}\n".encode())
    return descriptor


def check_free(run_dir: Path) -> None:
    """Raise a ``ValueError`` if another process holds the lock of the run. Does not take the lock or create files."""
    path = run_dir / LOCK
    if not os.access(path, os.R_OK):  # the run does not exist yet, or rank 0 reports the problem
        return
    with path.open() as file:
        try:
            held = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        except OSError:  # no locks on this file system: rank 0 reports it
            return
    if struct.unpack(FLOCK, held)[0] != fcntl.F_UNLCK:
        raise _in_use(run_dir)


def _in_use(run_dir: Path) -> ValueError:
    holder = (run_dir / LOCK).read_text().strip() or "another process"
    return ValueError(f"{run_dir} is in use by {holder}; wait for it, stop it, or set another run.name")


def port_taken(error: BaseException) -> bool:
    """Whether the error of a launcher or of rank 0 means that its port is in use."""
    return "EADDRINUSE" in str(error) or "address already in use" in str(error).lower()
