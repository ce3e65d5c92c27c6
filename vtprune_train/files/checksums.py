"""Files with checksums.

A *sealed* file contains bytes, a digest of them and a digest of an identity string. A *sealed folder* has a
``manifest.json``, written last, with the size and the CRC-32 of each of its files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from vtprune_train.files.disk import naming, remove, replace_synced, sync

MANIFEST = "manifest.json"
DIGEST_BYTES = 16
BLOCK = 1 << 20

Sums = Mapping[str, list[int]]  # file name -> [size in bytes, CRC-32]


class NewFile(ABC):
    """A new file that is written sequentially while its checksum is computed. Closing it syncs it to disk.

    Attributes:
        size: bytes written.
        error: the error of a failed write, for callers whose library raises another one instead.
    """

    def __init__(self, path: Path):
        self.path, self.size = path, 0
        self.error: OSError | None = None
        self._file = path.open("wb", buffering=0)

    @abstractmethod
    def update(self, content: Any) -> None:
        """Update the checksum with ``content``."""

    def write(self, content: Any) -> int:
        self.update(content)
        view = memoryview(content).cast("B")
        self.size += len(view)
        try:
            with naming(self.path):
                while view:
                    view = view[self._file.write(view) :]
        except OSError as error:
            self.error = error
            raise
        return len(content)

    def flush(self) -> None:
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        with self._file, naming(self.path):
            if kind is None:
                os.fsync(self._file.fileno())


class SummedFile(NewFile):
    """Computes the CRC-32 that a sealed folder's manifest has."""

    crc = 0

    def update(self, content: Any) -> None:
        self.crc = zlib.crc32(content, self.crc)

    @property
    def sums(self) -> list[int]:
        return [self.size, self.crc]


class HashedFile(NewFile):
    """Computes the SHA-256 that a checkpoint's manifest has. Hashing releases the GIL."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.sha256 = hashlib.sha256()

    def update(self, content: Any) -> None:
        self.sha256.update(content)


def write_sealed(path: Path, content: bytes, identity: str) -> None:
    """Write ``content`` with its ``identity``, atomically. Replaces an existing file or folder."""
    if path.is_dir():
        remove(path)
    replace_synced(path, content + _digest(identity.encode()) + _digest(content))


def read_sealed(path: Path, identity: str) -> bytes:
    """Read a file that :func:`write_sealed` wrote.

    Raises:
        ValueError: the file is damaged or has another identity.
        OSError: the file cannot be read.
    """
    check_regular(path)
    whole = path.read_bytes()
    content, name, digest = whole[: -2 * DIGEST_BYTES], whole[-2 * DIGEST_BYTES : -DIGEST_BYTES], whole[-DIGEST_BYTES:]
    if len(whole) < 2 * DIGEST_BYTES or _digest(content) != digest:
        raise ValueError(f"its {len(whole)} bytes are truncated or changed")
    if name != _digest(identity.encode()):
        raise ValueError("it has another identity")
    return content


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def seal(folder: Path, manifest: Mapping[str, Any], sums: Sums) -> None:
    """Write the manifest of a folder whose files are already on disk."""
    text = json.dumps({**manifest, "sums": dict(sums)}, indent=1)
    content = json.dumps({**json.loads(text), "checksum": zlib.crc32(text.encode())}, indent=1)
    replace_synced(folder / MANIFEST, content)


def seal_as_it_is(folder: Path) -> None:
    """Sync, checksum and seal a folder of existing files."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        sync(path)
    seal(folder, {}, {str(path.relative_to(folder)): checksum(path) for path in files})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a sealed folder, including ``sums``, without checking its files.

    Raises:
        ValueError: the manifest is damaged.
        OSError: the manifest cannot be read.
    """
    check_regular(folder / MANIFEST)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    if not isinstance(manifest, dict):
        raise ValueError("not a JSON object")
    checksum = manifest.pop("checksum", None)
    if zlib.crc32(json.dumps(manifest, indent=1).encode()) != checksum:
        raise ValueError("its content does not match its checksum")
    return manifest


def damage(folder: Path) -> str:
    """Check all files of a sealed folder. Returns the first problem, or an empty string."""
    try:
        sums = read_manifest(folder)["sums"]
    except (OSError, ValueError, KeyError, RecursionError) as error:
        return f"{MANIFEST}: {error}"
    for name, expected in sums.items():
        try:
            actual = checksum(folder / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if actual != expected:
            return f"{name} is truncated or changed"
    return ""


class Watch:
    """Detects in-place changes to the files of a sealed folder while they are memory-mapped. A file that is removed or
    replaced keeps its content for processes that have mapped it.

    Args:
        folder: the folder; its files have just been checked.
        sums: from its manifest.
    """

    def __init__(self, folder: Path, sums: Sums):
        self.folder, self.sums = folder, sums
        self._stamps = {name: _stamp(folder / name) for name in sums}

    def changed(self) -> str:
        """The name of a changed file; empty if there is none."""
        return next((name for name in self._stamps if self._is_changed(name)), "")

    def _is_changed(self, name: str) -> bool:
        now, before = _stamp(self.folder / name), self._stamps[name]
        if now == before or not now or not before or now[0] != before[0]:
            return False
        if checksum(self.folder / name) != self.sums[name]:
            return True
        self._stamps[name] = now  # only the owner or the number of links changed
        return False


def _stamp(path: Path) -> tuple[int, ...]:
    """File metadata that differs after every in-place change, even if its times were reset; empty if there is no
    file."""
    try:
        state = path.stat()
    except OSError:
        return ()
    return state.st_ino, state.st_dev, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def check_regular(path: Path) -> None:
    """Check that a path is a regular file. (Reading a pipe or device may never end.)

    Raises:
        OSError: it is something else, or does not exist.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def checksum(path: Path) -> list[int]:
    """Size in bytes and CRC-32 of a file."""
    check_regular(path)
    size = crc = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]
