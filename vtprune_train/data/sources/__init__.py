"""Data files: which files an entry of the settings names, and the reader of each kind."""

from __future__ import annotations

import glob
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vtprune_train.core.user_code import load_class
from vtprune_train.data.sources.base import BOUNDS, Piece, Place, Reader
from vtprune_train.data.sources.json_files import Jsonl, JsonList
from vtprune_train.data.sources.tars import Tar

KINDS: dict[str, type[Reader]] = {".json": JsonList, ".jsonl": Jsonl, ".tar": Tar}
ENDINGS = (*KINDS, ".parquet")
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")
KNOWN = "use .json (a list), .jsonl, .parquet, .tar, or a folder written by datasets' save_to_disk"


def find_files(path: Path, reader: str = "") -> list[Path]:
    """The data files of one entry of ``data.train`` or ``data.eval``, sorted: a file, a folder of files of one kind, a
    glob, or a dataset on disk. With ``reader``, files of any kind, and all files of a folder.

    Raises:
        ValueError: there is no file, or (without ``reader``) the kind is unknown or a folder holds several kinds; the
            message names the path.
    """
    if path.is_dir():
        return _of_any_kind(path) if reader else _in_folder(path)
    if path.is_file():
        names = [str(path)]
    elif glob.has_magic(str(path)):
        names = glob.glob(str(path), recursive=True)  # noqa: PTH207 (absolute patterns)
        names.sort(key=lambda name: name.split(os.sep))  # noqa: PTH206 (many times faster)
        if not names:
            raise ValueError(f"no data file matches {path}; check data.root and the path under data.train or data.eval")
    else:
        raise ValueError(f"data file {path} does not exist; check data.root and the path under data.train or data.eval")
    files = [Path(name) for name in names]
    for file in () if reader else files:
        if file.suffix in COMPRESSED:
            raise ValueError(f"data file {file} is compressed, so its records cannot be read one by one; unpack it")
        if file.suffix not in ENDINGS and not _is_dataset(file):
            raise ValueError(f"data file {file}: unknown file type {file.suffix!r}; {KNOWN}")
    return files


def is_here(path: Path) -> bool:
    """Whether a file, a folder, or a match of a glob exists at ``path``."""
    return path.exists() or next(glob.iglob(str(path), recursive=True), None) is not None  # noqa: PTH207


def _of_any_kind(folder: Path) -> list[Path]:
    if files := sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")):
        return files
    raise ValueError(f"data folder {folder} is empty; check data.root and the path under data.train or data.eval")


def _in_folder(folder: Path) -> list[Path]:
    if _is_dataset(folder):
        return [folder]
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(part.name for part in folder.iterdir() if _is_dataset(part))
        raise ValueError(f"data folder {folder} contains several datasets ({', '.join(splits)}); name one of them")
    with os.scandir(folder) as entries:
        # Compare endings first: ``is_file`` may cost a system call for each entry.
        names = sorted(entry.name for entry in entries if entry.name[1:].endswith(ENDINGS) and entry.is_file())
    files = [folder / name for name in names]
    if not files:
        raise ValueError(f"data folder {folder} contains no data file; {KNOWN}")
    if len(kinds := sorted({file.suffix for file in files})) > 1:
        raise ValueError(f"data folder {folder} contains several file types ({', '.join(kinds)}); select one by a glob")
    return files


def _is_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def open_reader(file: Path, max_bytes: int = BOUNDS.record, reader: str = "") -> Reader:
    """A reader of a file that :func:`find_files` returned. It does not read records of more than ``max_bytes``.

    Args:
        reader: path of a subclass of :class:`Reader`; without one, the file's ending decides.

    Raises:
        ValueError: ``reader`` does not name such a class, or its constructor fails.
    """
    if reader:
        return _UserReader(file, max_bytes, reader)
    if file.suffix in KINDS and not file.is_dir():
        return KINDS[file.suffix](file, max_bytes)
    from vtprune_train.data.sources.tables import DatasetOnDisk, Parquet  # imported late: Arrow starts a thread

    return DatasetOnDisk(file, max_bytes) if file.is_dir() else Parquet(file, max_bytes)


def reader_class(path: str, key: str = "reader") -> type[Reader]:
    """The reader at a path; ``key`` is the setting that holds it.

    Raises:
        ValueError: ``path`` does not name a subclass of :class:`Reader`.
    """
    return load_class(path, Reader, key)  # type: ignore[type-abstract]


def reader_identity(reader: str) -> list[str]:
    """The path of a reader from outside the package and the hash of its module: an index built by another reader or
    version is rebuilt."""
    module = sys.modules[reader_class(reader).__module__]
    return [reader, hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()[:16]]


class _UserReader(Reader):
    """A reader from outside the package. Its errors name it, and the first record of each piece is read a second time
    by its place, as in training."""

    def __init__(self, path: Path, max_bytes: int, reader: str):
        super().__init__(path, max_bytes)
        self._name, self._class = reader, reader_class(reader)
        self._inner = self._open()

    @property
    def unread(self) -> list[str]:
        return self._inner.unread

    def pieces(self) -> Iterator[Piece]:
        with self._errors_named():
            for start, stop in self._inner.pieces():
                yield Piece(int(start), int(stop))

    def scan(self, piece: Piece) -> Iterator[tuple[Place, Any]]:
        is_first = True
        with self._errors_named():
            for (at, size), record in self._inner.scan(piece):
                place = Place(int(at), int(size))
                if is_first and not _is_equal(again := self._open().read(place), record):
                    raise ValueError(f"read({place}) returns {again!r:.200}, but scan yielded {record!r:.200} there")
                is_first = False
                yield place, record

    def read(self, place: Place) -> Any:
        with self._errors_named():
            return self._inner.read(place)

    def _open(self) -> Reader:
        with self._errors_named():
            return self._class(self.path, self.max_bytes)

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            raise  # names the file
        except Exception as error:
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"data file {self.path}: reader {self._name} failed ({reason}); correct it") from error


def _is_equal(first: Any, second: Any, field: str = "the record") -> bool:
    """Whether two records are equal; NaN equals NaN.

    Raises:
        ValueError: a field cannot be compared because it is not plain data.
    """
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_is_equal(first[k], second[k], f"field {k!r}") for k in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(_is_equal(*pair, field) for pair in zip(first, second, strict=True))
    if getattr(first, "ndim", 0) or (first is not None and type(first).__eq__ is object.__eq__):
        raise ValueError(f"{field} is a {type(first).__name__}, but a record is plain data as in JSON; convert it")
    return bool(first == second or (first != first and second != second))


def stamp(file: Path) -> list[int]:
    """Size in bytes, modification time and inode change time (``ctime``, which programs cannot set) in ns; for a
    dataset on disk, the total size and latest times of its files."""
    parts = sorted(file.iterdir()) if file.is_dir() else [file]
    states = [part.stat() for part in parts]
    return [
        sum(state.st_size for state in states),
        max(state.st_mtime_ns for state in states),
        max(state.st_ctime_ns for state in states),
    ]
