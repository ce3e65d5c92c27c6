"""Early data checks: files and folders exist, and the first records are usable."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vtprune_train.config.data import SourceConfig
from vtprune_train.config.errors import ConfigError, nearest_name
from vtprune_train.config.settings import Config
from vtprune_train.core.user_code import is_path
from vtprune_train.data.auto_template import AUTO
from vtprune_train.data.images import UNREADABLE
from vtprune_train.data.index import HOW_TO_FIX, list_fields, most_bad
from vtprune_train.data.records import Conversation, default_id, normalize
from vtprune_train.data.sources import find_files, is_here, open_reader, reader_class
from vtprune_train.data.sources.base import Bounds, TooLarge
from vtprune_train.data.visuals import NO_VIDEOS
from vtprune_train.models.forward.attention import user_function

NUM_CHECKED = 200  # records of each entry
SPLITS: tuple[Literal["train", "eval"], ...] = ("train", "eval")
WITHOUT_DATA = "To estimate sizes on a machine without the data, add data.train=[] data.eval=[]"


def check_paths(config: Config) -> None:
    """Raise ``ConfigError`` with one line per missing file or folder in the data settings, and per reader or attention
    function that cannot be loaded."""
    lines = list(_wrong_code(config))
    for key, path in _paths(config):
        if not key.endswith("path"):
            if not path.is_dir():
                kind = key.rpartition(".")[2]
                what = f"is a file, not a folder of {kind}" if path.exists() else "does not exist"
                lines.append(f"{key}: {path} {what}{_nearest(path)}")
            elif not os.access(path, os.R_OK | os.X_OK):
                lines.append(f"{key}: {path} cannot be read (permission denied)")
        elif not is_here(path):
            lines.append(f"{key}: {path} does not exist{_nearest(path)}")
        elif path.exists() and not os.access(path, os.R_OK):
            lines.append(f"{key}: {path} cannot be read (permission denied)")
    if lines:
        relative = "" if Path(config.data.root).is_absolute() else f" (working directory: {Path.cwd()})"
        raise ConfigError("\n".join([*lines, f"paths are relative to data.root={config.data.root}{relative}"]))


def check_run_dir(run_dir: Path) -> None:
    """Raise ``ConfigError`` if the run folder cannot be created or written. Does not create it."""
    place = next(parent for parent in (run_dir, *run_dir.parents) if parent.exists() or parent.is_symlink())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(unwritable("run.output_dir", run_dir, OSError(errno.EACCES, os.strerror(errno.EACCES))))


def unwritable(key: str, folder: Path, error: OSError) -> str:
    """Error message for a folder that cannot be created or written."""
    reason = error.strerror or str(error)
    for part in (folder, *folder.parents):
        if part.is_symlink() and not part.exists():
            reason = f"{part} is a link to {part.readlink()}, which does not exist"
        elif part.exists() and not part.is_dir():
            reason = f"{part} is a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{key}: {folder} cannot be written ({reason}); free disk space or choose another folder"
    return f"{key}: {folder} cannot be written ({reason}); choose a writable folder"


def any_data_here(config: Config) -> bool:
    """Whether any data file in the settings exists on this machine."""
    return any(is_here(path) for key, path in _paths(config) if key.endswith("path"))


def check_records(config: Config) -> list[str]:
    """Read the first records and image headers of each data entry; return one report line per entry.

    Raises:
        ConfigError: too many of an entry's first records are unusable; the message contains the config key and the
            first reasons.
        ValueError: a file cannot be read.
    """
    checks = {
        f"data.{which}.{number}": _check_entry(f"data.{which}.{number}", source, config)
        for which in SPLITS
        for number, source in enumerate(config.sources(which))
    }
    if wrong := [check.wrong for check in checks.values() if check.wrong]:
        raise ConfigError("\n".join(wrong))
    lines = [f"{key:<14}{check.line}" for key, check in checks.items()]
    counts = [check.records for key, check in checks.items() if key.startswith("data.train")]
    batch = config.train.global_batch_size
    if counts and max(counts) < NUM_CHECKED and sum(counts) < batch:
        size = f"train.global_batch_size={batch}"
        lines.append(f"{'':<14}{size} is larger than the {sum(counts)} record(s) of data.train")
    return lines


class _EntryCheck(NamedTuple):
    """Result of checking an entry's first records: report line, error (if too many are bad), and number of records."""

    line: str
    wrong: str
    records: int


def _check_entry(key: str, source: SourceConfig, config: Config) -> _EntryCheck:
    images, data = Path(source.images), config.data
    number, reasons, large = 0, [], []
    unread: Counter[str] = Counter()
    for record in _first_records(source, Bounds(data.max_record_bytes, data.max_text_bytes), data.template == AUTO):
        number += 1  # the record is not kept: it may contain images
        unread.update(record.unread)
        if isinstance(record.error, TooLarge):
            large.append(f"{record.id}: {record.error}")
        elif reason := _unusable(record, source, data.max_image_pixels):
            reasons.append(f"{record.id}: {reason}")
    fields = f"; ignored fields: {list_fields(unread)}" if unread else ""
    bad = f", {len(reasons)} cannot be used (first: {reasons[0]})" if reasons else ""
    skipped = f", {len(large)} are too large (first: {large[0]})" if large else ""
    if large and (data.too_long == "error" or len(large) == number):
        wrong = (
            f"{key}: {len(large)} of the first {number} records of {source.path} are too large. {HOW_TO_FIX}. "
            f"First: {'; '.join(large[:3])}"
        )
        return _EntryCheck("", wrong, number)
    wrong = ""
    # Bad records may be clustered at the start of a file, so the bad share is unknown if more records follow.
    most = data.max_bad if number == NUM_CHECKED else min(most_bad(data.max_bad_share, number), data.max_bad)
    if reasons and (len(reasons) > most or len(reasons) + len(large) == number):
        wrong = (
            f"{key}: {len(reasons)} of the first {number} records of {source.path} (images in {images}) cannot be used "
            f"(data.max_bad={data.max_bad}, data.max_bad_share={data.max_bad_share:g}). First: {'; '.join(reasons[:3])}"
        )
    return _EntryCheck(f"{source.path}: first {number} record(s) checked{bad}{skipped}{fields}", wrong, number)


def _paths(config: Config) -> list[tuple[str, Path]]:
    return [
        (f"data.{which}.{number}.{name}", Path(getattr(source, name)))
        for which in SPLITS
        for number, source in enumerate(config.sources(which))
        for name in ("path", "images", "videos")
        if getattr(source, name) is not None
    ]


def _wrong_code(config: Config) -> Iterator[str]:
    """A line for each reader or attention function that cannot be loaded."""
    paths: dict[str, Callable[[], Any]] = {}
    if is_path(config.model.attention):
        paths["model."] = partial(user_function, config.model.attention)
    for which in SPLITS:
        for number, source in enumerate(config.sources(which)):
            if source.reader is not None:
                paths[f"data.{which}.{number}."] = partial(reader_class, source.reader)
    for section, load in paths.items():
        try:
            load()
        except ValueError as error:
            yield f"{section}{error}"


def _first_records(source: SourceConfig, bounds: Bounds, chat: bool) -> Iterator[Conversation]:
    file = find_files(Path(source.path), source.reader or "")[0]
    reader = open_reader(file, bounds.record, source.reader or "")
    records = (record for piece in reader.pieces() for _, record in reader.scan(piece))
    number = -1
    for number, content in enumerate(islice(records, NUM_CHECKED)):
        record = normalize(content, default_id(file, number), source.ignore, bounds.text, chat=chat)
        yield replace(record, unread=record.unread | frozenset(reader.unread))
    if number < 0:
        raise ValueError(f"data file {file} contains no records")


def _unusable(record: Conversation, source: SourceConfig, max_pixels: int) -> str:
    """Reason why a record is unusable; empty if it looks fine judging by headers only."""
    if record.error:
        return record.error
    if record.videos and source.videos is None:
        return NO_VIDEOS
    for file in record.files(Path(source.images), Path(source.videos or source.images)):
        try:
            file.check_header(max_pixels)
        except UNREADABLE as error:
            return f"{file.kind} {error}"
        except ValueError as error:
            return str(error)
    return ""


def _nearest(path: Path) -> str:
    """Suggest an existing sibling for a missing path."""
    if path.exists() or not path.parent.is_dir():
        missing = next((parent for parent in reversed(path.parents) if not parent.exists()), None)
        return f" (there is no {missing})" if missing is not None else ""
    with os.scandir(path.parent) as entries:
        name = nearest_name(path.name, (entry.name for entry in entries), 0.5)
    return f"; did you mean {path.parent / name}?" if name else ""
