"""One process group per run's folder."""

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
    """Take the run's folder for as long as this process lives; rank 0 alone calls this, before it changes anything.

    A POSIX record lock: the kernel drops it with the process, however that ends, processes that it forks do not inherit
    it, and NFS (version 4, or 3 with its lock daemon) carries it to other machines.

    Returns:
        A descriptor; closing it lets the folder go earlier.

    Raises:
        ValueError: another process holds it.
    """
    path = run_dir / LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # closing any descriptor drops the lock
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if not isinstance(error, BlockingIOError | PermissionError):
            raise ValueError(
                f"{path} cannot be locked ({error}); put run.output_dir on a file system with locks"
            ) from error
        raise _in_use(run_dir) from error
    os.ftruncate(descriptor, 0)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {started}\n".encode())
    return descriptor


def check_free(run_dir: Path) -> None:
    """Raise a ``ValueError`` if another process holds the run. Nothing is taken or made: rank 0 does that later."""
    path = run_dir / LOCK
    if not os.access(path, os.R_OK):  # there is no such run yet; or rank 0 says what is wrong
        return
    with path.open() as file:
        try:
            found = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        except OSError:  # a file system without locks: rank 0 says so
            return
    if struct.unpack(FLOCK, found)[0] != fcntl.F_UNLCK:
        raise _in_use(run_dir)


def _in_use(run_dir: Path) -> ValueError:
    holder = (run_dir / LOCK).read_text().strip() or "another process"
    return ValueError(f"{run_dir} is in use by {holder}; wait for it, stop it, or give this run another run.name")


def port_taken(error: BaseException) -> bool:
    """Whether a launcher or rank 0 failed because its port is in use."""
    return "EADDRINUSE" in str(error) or "address already in use" in str(error).lower()
