"""Files that are on disk when a function returns, whole under their name or not there at all, and errors that name the
file."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS)  # of a folder
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
        error.add_note("Make room there and start again; what is finished is kept")
    return error


def locked(path: Path) -> FileLock:
    """A lock by a file, to be entered. A folder or a link that has its name goes: no process can hold that."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        remove(path)
    return FileLock(str(path))


def write_synced(path: Path, data: str | bytes) -> None:
    """Write a file; it is on disk when this returns."""
    with naming(path), path.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def replace_synced(path: Path, data: str | bytes) -> None:
    """Write a file anew: at any moment ``path`` holds the old content or the new one, and it is on disk when this
    returns.

    Raises:
        OSError: it cannot be written, or there is a folder in its place that holds something; names ``path``.
    """
    partial = path.with_name(f"{path.name}.tmp")
    remove(partial)
    try:
        write_synced(partial, data)
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def publish(partial: Path, path: Path) -> None:
    """Rename a folder that is on disk to its name, in place of whatever has it; the name is on disk then."""
    remove(path)
    partial.replace(path)
    sync(path.parent)


def remove(path: Path, ignore_errors: bool = False) -> None:
    """Delete whatever is there: a file, a link (not what it leads to) or a folder with all it holds; nothing is fine
    too. With ``ignore_errors`` what cannot be deleted in a folder stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's list of names, to disk. Some network file systems refuse the latter; there it
    is left to them, as databases do."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in NO_SYNC or not path.is_dir():
                raise
        finally:
            os.close(descriptor)
