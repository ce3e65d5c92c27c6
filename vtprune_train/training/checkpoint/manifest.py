"""Checkpoint folders on disk: their manifest, what is wrong with them, and how they come and go.

Nothing here needs DeepSpeed or a process group: the training loop and ``vtprune checkpoint`` share it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from vtprune_train.files.disk import naming, remove, replace_synced, sync, write_synced

STEP = re.compile(r"^step_(\d{8,})$")
MANIFEST = "manifest.json"
LATEST = "latest"
LOGS = "logs"  # copies of what a run writes line by line
FORMAT = 1
HASHING_THREADS = 4


def steps(folder: Path) -> list[Path]:
    """Checkpoints in a ``checkpoints/`` folder, oldest first (not verified). One without a manifest had it once: a
    folder gets its name after everything is in it."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if STEP.match(path.name) and path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The global step that a checkpoint's folder is named after."""
    return int(checkpoint.name.removeprefix("step_").partition(".")[0])


def read_manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """The files of a checkpoint: name -> ``{size, sha256}``.

    Raises:
        ValueError: the manifest is missing, no JSON, or not of this form, or names a file outside the checkpoint.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        if manifest["format"] > FORMAT:
            raise ValueError(f"it has format {manifest['format']}, this version reads up to {FORMAT}")
        files = {
            str(name): {"size": int(e["size"]), "sha256": str(e["sha256"])} for name, e in manifest["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    if "trainer.json" not in files:
        raise ValueError(f"{MANIFEST} does not list trainer.json")
    if outside := sorted(name for name in files if not _is_inside(name)):
        raise ValueError(f"{MANIFEST} names {outside[0]}, which is no file of the checkpoint")
    return files


def _is_inside(name: str) -> bool:
    """Whether a relative name stays below the folder that it is seen from."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and str(path) == name


def problems(checkpoint: Path, part: str = "") -> list[str]:
    """All that is wrong with a checkpoint's files (of those whose names begin with ``part``), one line each."""
    try:
        files = {name: entry for name, entry in read_manifest(checkpoint).items() if name.startswith(part)}
    except ValueError as error:
        return [str(error)]
    with ThreadPoolExecutor(HASHING_THREADS) as pool:  # hashing releases the interpreter's lock
        found = pool.map(lambda item: _problem(checkpoint / item[0], *item), files.items())
        return [problem for problem in found if problem]


def verify(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, in one line, or ``None``."""
    return "; ".join(problems(checkpoint)) or None


def check_export(source: str | Path) -> None:
    """Raise a ``ValueError`` if a file of a checkpoint's ``hf/`` folder, which weights are taken from, is not what the
    manifest says; another folder, or a hub id, passes."""
    checkpoint, part = Path(source).parent, f"{Path(source).name}/"
    if not (checkpoint / MANIFEST).is_file():
        return
    if found := problems(checkpoint, part):
        raise ValueError(f"{checkpoint} is damaged: {'; '.join(found)}. Name an older step_XXXXXXXX of the run")


def _problem(path: Path, name: str, entry: dict[str, Any]) -> str | None:
    try:
        if not path.is_file():
            return f"{name} is missing"
        if not path.resolve().is_relative_to(path.parents[name.count("/")].resolve()):
            return f"{name} is a link to {path.resolve()}, outside of the checkpoint"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
        if hash_file(path) != entry["sha256"]:
            return f"{name} does not have the recorded SHA-256"
    except OSError as error:
        return f"{name} cannot be read ({error})"
    return None


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_and_hash(path: Path) -> dict[str, Any]:
    """The manifest's entry of a file, which is on disk when this returns."""
    with naming(path), path.open("rb") as file:
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": hash_file(path)}


def files_in(folder: Path) -> Iterator[str]:
    """Names of all files below a folder, relative to it."""
    return (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file())


def write_manifest(partial: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Declare a folder complete; all files and folders are on disk when this returns."""
    manifest = {"format": FORMAT, "files": dict(sorted(entries.items()))}
    write_synced(partial / MANIFEST, json.dumps(manifest, indent=1))
    for folder in sorted({(partial / name).parent for name in entries} | {partial}):
        sync(folder)


def put_in_place(partial: Path, final: Path) -> None:
    """Give a complete folder its name; one that had it goes."""
    if final.exists():
        remove_checkpoint(final)
    partial.rename(final)
    sync(final.parent)


def point_latest(folder: Path, name: str) -> None:
    """Let ``latest`` name a checkpoint of the folder."""
    replace_synced(folder / LATEST, name)


def named_latest(folder: Path) -> Path | None:
    """The checkpoint that ``latest`` names, if it is there."""
    try:
        name = (folder / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return folder / name if STEP.match(name) and (folder / name / MANIFEST).is_file() else None


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete so that a half-deleted folder is never taken for a checkpoint, and that another process may do the same
    at the same time."""
    doomed = checkpoint.with_suffix(".deleting")
    if doomed.exists():
        remove(doomed, ignore_errors=True)
    try:
        checkpoint.rename(doomed)
    except FileNotFoundError:  # the other one was faster
        return
    remove(doomed, ignore_errors=True)
