"""One process group per run's folder."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path

LOCK = "run.lock"


def hold_run(run_dir: Path) -> int:
    """Take the run's folder for as long as this process lives; rank 0 alone calls this, before it changes anything.

    A POSIX record lock: the kernel drops it with the process, however that ends, forked loader workers do not inherit
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
        holder = path.read_text().strip() or "another process"
        os.close(descriptor)
        if not isinstance(error, BlockingIOError | PermissionError):
            raise ValueError(
                f"{path} cannot be locked ({error}); put run.output_dir on a file system with locks"
            ) from error
        raise ValueError(
            f"{run_dir} is in use by {holder}; wait for it, stop it, or give this run another run.name"
        ) from error
    os.ftruncate(descriptor, 0)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {started}\n".encode())
    return descriptor
