"""Durable and atomic file operations, with errors that name the file."""

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
NO_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS)  # file systems that cannot sync a folder
RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # in errors of safetensors and tokenizers


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add ``path`` to errors of the operating system. Those of ``write`` and ``fsync`` (a full disk, a quota, a failing
    device) do not contain a file name, and those of Rust libraries are not of type ``OSError``.

    Raises:
        OSError: the error raised inside, with a file name.
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
        error.add_note("Free disk space and start again; finished work is kept")
    return error


def locked(path: Path) -> FileLock:
    """A file lock, to be used in a ``with`` statement. A folder or link at ``path`` is removed first, because it
    cannot be a lock."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        remove(path)
    return FileLock(str(path))


def write_synced(path: Path, data: str | bytes) -> None:
    """Write a file and sync it to disk."""
    with naming(path), path.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def replace_synced(path: Path, data: str | bytes) -> None:
    """Replace a file atomically and sync it to disk: ``path`` always has either the old or the new content.

    Raises:
        OSError: the file cannot be written, or ``path`` is a folder that is not empty; the error names ``path``.
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
    """Rename the synced folder ``partial`` to ``path``, replacing what is there, and sync the new name."""
    remove(path)
    partial.replace(path)
    sync(path.parent)


def remove(path: Path, ignore_errors: bool = False) -> None:
    """Delete a file, a link (not its target) or a folder with its content, if it exists. With ``ignore_errors``, files
    in a folder that cannot be deleted are kept."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Sync a file, or a folder's directory entries, to disk. Some network file systems cannot sync folders; the
    error is ignored, as in databases."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in NO_SYNC or not path.is_dir():
                raise
        finally:
            os.close(descriptor)
