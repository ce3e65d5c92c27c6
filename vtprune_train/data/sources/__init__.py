"""Data files: what a path of the settings stands for, and the reader of each kind."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from vtprune_train.data.sources.base import BOUNDS, Reader
from vtprune_train.data.sources.json_files import Jsonl, JsonList
from vtprune_train.data.sources.tars import Tar

KINDS: dict[str, type[Reader]] = {".json": JsonList, ".jsonl": Jsonl, ".tar": Tar}
ENDINGS = (*KINDS, ".parquet")
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")
KNOWN = "use .json (a list), .jsonl, .parquet, .tar, or a folder written by datasets' save_to_disk"


def find_files(path: Path) -> list[Path]:
    """The data files of one entry of ``data.train`` or ``data.eval``: a file, a folder of files of one kind, a glob, or
    a dataset on disk; sorted.

    Raises:
        ValueError: there is none, it is of an unknown kind, or a folder holds several kinds; names it.
    """
    if path.is_dir():
        return _in_folder(path)
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
    for file in files:
        if file.suffix in COMPRESSED:
            raise ValueError(f"data file {file} is compressed, so no record of it can be reached by itself; unpack it")
        if file.suffix not in ENDINGS and not _is_dataset(file):
            raise ValueError(f"data file {file}: unknown kind {file.suffix!r}; {KNOWN}")
    return files


def is_here(path: Path) -> bool:
    """Whether there is anything that :func:`find_files` could look at."""
    return path.exists() or next(glob.iglob(str(path), recursive=True), None) is not None  # noqa: PTH207


def _in_folder(folder: Path) -> list[Path]:
    if _is_dataset(folder):
        return [folder]
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(part.name for part in folder.iterdir() if _is_dataset(part))
        raise ValueError(f"data folder {folder} holds several datasets ({', '.join(splits)}); name one of them")
    with os.scandir(folder) as entries:
        # Endings are compared before the system is asked what each of the entries is.
        names = sorted(entry.name for entry in entries if entry.name[1:].endswith(ENDINGS) and entry.is_file())
    files = [folder / name for name in names]
    if not files:
        raise ValueError(f"data folder {folder} holds no data file; {KNOWN}")
    if len(kinds := sorted({file.suffix for file in files})) > 1:
        raise ValueError(f"data folder {folder} holds files of several kinds ({', '.join(kinds)}); name them by a glob")
    return files


def _is_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def open_reader(file: Path, max_bytes: int = BOUNDS.record) -> Reader:
    """The reader of one of the files that :func:`find_files` gave; a record of more than ``max_bytes`` is not read."""
    if file.suffix in KINDS and not file.is_dir():
        return KINDS[file.suffix](file, max_bytes)
    from vtprune_train.data.sources.tables import DatasetOnDisk, Parquet  # imported late: Arrow starts a thread

    return DatasetOnDisk(file, max_bytes) if file.is_dir() else Parquet(file, max_bytes)


def stamp(file: Path) -> list[int]:
    """Size in bytes, time of the last change in ns, and time of the last change of anything (``ctime``), which no
    program can set back; of a dataset on disk, those of all its files together."""
    parts = sorted(file.iterdir()) if file.is_dir() else [file]
    states = [part.stat() for part in parts]
    return [
        sum(state.st_size for state in states),
        max(state.st_mtime_ns for state in states),
        max(state.st_ctime_ns for state in states),
    ]
