"""Before anything starts: the data's files and folders are there, and their first records can be used."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from vtprune_train.config.data import SourceConfig
from vtprune_train.config.errors import ConfigError, nearest_name
from vtprune_train.config.settings import Config
from vtprune_train.data.images import UNREADABLE, image_size
from vtprune_train.data.index import TO_MEND, most_bad, shown_fields
from vtprune_train.data.measure import picture_name
from vtprune_train.data.records import Conversation, default_id, normalize
from vtprune_train.data.sources import find_files, is_here, open_reader
from vtprune_train.data.sources.base import Bounds, TooLarge

LOOKED_AT = 200  # records of each entry
SPLITS: tuple[Literal["train", "eval"], ...] = ("train", "eval")
WITHOUT_DATA = "To see sizes on a machine without the data, add data.train=[] data.eval=[]"


def check_paths(config: Config) -> None:
    """Raise a ``ConfigError`` with a line for each file and folder of the data settings that is missing."""
    lines = []
    for key, path in _paths(config):
        if key.endswith("images"):
            if not path.is_dir():
                what = "is a file, not a folder of images" if path.exists() else "does not exist"
                lines.append(f"{key}: {path} {what}{_nearest(path)}")
            elif not os.access(path, os.R_OK | os.X_OK):
                lines.append(f"{key}: {path} cannot be read (permission denied)")
        elif not is_here(path):
            lines.append(f"{key}: {path} does not exist{_nearest(path)}")
        elif path.exists() and not os.access(path, os.R_OK):
            lines.append(f"{key}: {path} cannot be read (permission denied)")
    if lines:
        relative = "" if Path(config.data.root).is_absolute() else f", seen from {Path.cwd()}"
        raise ConfigError("\n".join([*lines, f"paths are relative to data.root={config.data.root}{relative}"]))


def check_run_dir(run_dir: Path) -> None:
    """Raise a ``ConfigError`` if the run's folder cannot be made or written; it is not made here."""
    place = next(parent for parent in (run_dir, *run_dir.parents) if parent.exists() or parent.is_symlink())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(unwritable("run.output_dir", run_dir, OSError(errno.EACCES, os.strerror(errno.EACCES))))


def unwritable(key: str, folder: Path, error: OSError) -> str:
    """What to say of a folder that cannot be made or written."""
    reason = error.strerror or str(error)
    for part in (folder, *folder.parents):
        if part.is_symlink() and not part.exists():
            reason = f"{part} is a link to {part.readlink()}, which does not exist"
        elif part.exists() and not part.is_dir():
            reason = f"{part} is a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{key}: {folder} cannot be written ({reason}); make room, or name another folder"
    return f"{key}: {folder} cannot be written ({reason}); name a folder in which you may write"


def any_data_here(config: Config) -> bool:
    """Whether any data file of the settings is on this machine."""
    return any(is_here(path) for key, path in _paths(config) if key.endswith("path"))


def look_at_data(config: Config) -> list[str]:
    """Read the first records of each entry and the headers of their images; a line for each entry.

    Raises:
        ConfigError: too many of an entry's first records cannot be used; names the entry's key and the first reasons.
        ValueError: a file cannot be read.
    """
    looks = {
        f"data.{which}.{number}": _look(f"data.{which}.{number}", source, config)
        for which in SPLITS
        for number, source in enumerate(config.sources(which))
    }
    if wrong := [look.wrong for look in looks.values() if look.wrong]:
        raise ConfigError("\n".join(wrong))
    lines = [f"{key:<14}{look.line}" for key, look in looks.items()]
    counts = [look.records for key, look in looks.items() if key.startswith("data.train")]
    batch = config.train.global_batch_size
    if counts and max(counts) < LOOKED_AT and sum(counts) < batch:
        size = f"train.global_batch_size={batch}"
        lines.append(f"{'':<14}{size} is larger than these {sum(counts)} record(s) of data.train")
    return lines


class _Look(NamedTuple):
    """What the first records of an entry are like: a line for the report, what is wrong if much is, their number."""

    line: str
    wrong: str
    records: int


def _look(key: str, source: SourceConfig, config: Config) -> _Look:
    images, data = Path(source.images), config.data
    number, reasons, large = 0, [], []
    unread: Counter[str] = Counter()
    for record in _first_records(Path(source.path), source.ignore, Bounds(data.max_record_bytes, data.max_text_bytes)):
        number += 1  # its pictures, which may be inside, go with it
        unread.update(record.unread)
        if isinstance(record.error, TooLarge):
            large.append(f"{record.id}: {record.error}")
        elif reason := _unusable(record, images, data.max_image_pixels):
            reasons.append(f"{record.id}: {reason}")
    fields = f"; fields that are not read: {shown_fields(unread)}" if unread else ""
    bad = f", {len(reasons)} cannot be used (first: {reasons[0]})" if reasons else ""
    skipped = f", {len(large)} are too large (first: {large[0]})" if large else ""
    if large and (data.too_long == "error" or len(large) == number):
        wrong = (
            f"{key}: {len(large)} of the first {number} records of {source.path} are too large. {TO_MEND}. "
            f"First: {'; '.join(large[:3])}"
        )
        return _Look("", wrong, number)
    wrong = ""
    # Bad records may stand together at the beginning of a file: where more follow, their share is not known yet.
    most = data.max_bad if number == LOOKED_AT else min(most_bad(data.max_bad_share, number), data.max_bad)
    if reasons and (len(reasons) > most or len(reasons) + len(large) == number):
        wrong = (
            f"{key}: {len(reasons)} of the first {number} records of {source.path} (images in {images}) cannot be used "
            f"(data.max_bad={data.max_bad}, data.max_bad_share={data.max_bad_share:g}). First: {'; '.join(reasons[:3])}"
        )
    return _Look(f"{source.path}: {number} first record(s) looked at{bad}{skipped}{fields}", wrong, number)


def _paths(config: Config) -> list[tuple[str, Path]]:
    return [
        (f"data.{which}.{number}.{name}", Path(getattr(source, name)))
        for which in SPLITS
        for number, source in enumerate(config.sources(which))
        for name in ("path", "images")
    ]


def _first_records(path: Path, ignore: list[str], bounds: Bounds) -> Iterator[Conversation]:
    file = find_files(path)[0]
    reader = open_reader(file, bounds.record)
    records = (record for piece in reader.pieces() for _, record in reader.scan(piece))
    number = -1
    for number, content in enumerate(islice(records, LOOKED_AT)):
        record = normalize(content, default_id(file, number), ignore, bounds.text)
        yield replace(record, unread=record.unread | frozenset(reader.unread))
    if number < 0:
        raise ValueError(f"data file {file} holds no record")


def _unusable(record: Conversation, images: Path, max_pixels: int) -> str:
    """Why a record cannot be used; empty if it can, as far as headers tell."""
    if record.error:
        return record.error
    for number, picture in enumerate(record.pictures(images)):
        try:
            image_size(picture, max_pixels=max_pixels, name=picture_name(picture, number))
        except UNREADABLE as error:
            return f"image {error}"
    return ""


def _nearest(path: Path) -> str:
    """A name beside a path that is missing which it may have meant."""
    if path.exists() or not path.parent.is_dir():
        missing = next((parent for parent in reversed(path.parents) if not parent.exists()), None)
        return f" (there is no {missing})" if missing is not None else ""
    with os.scandir(path.parent) as entries:
        name = nearest_name(path.name, (entry.name for entry in entries), 0.5)
    return f"; did you mean {path.parent / name}?" if name else ""
