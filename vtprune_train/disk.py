"""Files that are on disk when a function returns, and errors that name the file."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors and tokenizers report an error of the system


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make an error of the operating system name ``path``: those of ``write`` and ``fsync`` (a full disk, a quota, a
    failing device) name no file, and those of libraries in Rust are no ``OSError``.

    Raises:
        OSError: what was raised inside, with a file name.
    """
    try:
        yield
    except OSError as error:
        _complete(error, path)
        raise
    except Exception as error:
        number = RUST_ERROR.search(str(error))
        if number is None:
            raise
        raise _complete(OSError(int(number[1]), os.strerror(int(number[1]))), path) from error


def _complete(error: OSError, path: Path) -> OSError:
    if error.errno is not None and error.filename is None:
        error.filename = str(path)
    if error.errno in NO_ROOM and not hasattr(error, "__notes__"):
        error.add_note("Make room there and start again; training goes on from the newest checkpoint")
    return error


def write_synced(path: Path, data: str | bytes) -> None:
    """Write a file; it is on disk when this returns."""
    with naming(path), path.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def replace_synced(path: Path, data: str | bytes) -> None:
    """Write a file anew: at any moment ``path`` holds the old content or the new one, and it is on disk when this
    returns."""
    partial = path.with_name(f"{path.name}.tmp")
    try:
        write_synced(partial, data)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
