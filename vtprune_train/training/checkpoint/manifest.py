"""Checkpoint folders on disk: manifest, verification, publishing and deletion.

Needs neither DeepSpeed nor a process group; used by the training loop and by ``vtprune checkpoint``.
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
LOGS = "logs"  # copies of the run's JSON Lines files
FORMAT = 1
HASHING_THREADS = 4


def steps(folder: Path) -> list[Path]:
    """Checkpoints in a ``checkpoints/`` folder, oldest first, not verified. (A folder is renamed to its final name
    after its manifest was written.)"""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if STEP.match(path.name) and path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The global step in the name of a checkpoint folder."""
    return int(checkpoint.name.removeprefix("step_").partition(".")[0])


def read_manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Read the files of a checkpoint: name -> ``{size, sha256}``.

    Raises:
        ValueError: the manifest is missing or invalid, or names a file outside the checkpoint.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        if manifest["format"] > FORMAT:
            raise ValueError(
                f"format {manifest['format']} is newer than this version reads ({FORMAT}); upgrade vtprune-train"
            )
        files = {
            str(name): {"size": int(e["size"]), "sha256": str(e["sha256"])} for name, e in manifest["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    if "trainer.json" not in files:
        raise ValueError(f"{MANIFEST} does not list trainer.json")
    if outside := sorted(name for name in files if not _is_inside(name)):
        raise ValueError(f"{MANIFEST} names {outside[0]}, which is outside the checkpoint")
    return files


def _is_inside(name: str) -> bool:
    """Whether a relative path stays inside its folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and str(path) == name


def problems(checkpoint: Path, part: str = "") -> list[str]:
    """Check a checkpoint's files whose names start with ``part``. Returns one line per problem."""
    try:
        files = {name: entry for name, entry in read_manifest(checkpoint).items() if name.startswith(part)}
    except ValueError as error:
        return [str(error)]
    with ThreadPoolExecutor(HASHING_THREADS) as pool:  # hashing releases the GIL
        results = pool.map(lambda item: _problem(checkpoint / item[0], *item), files.items())
        return [problem for problem in results if problem]


def verify(checkpoint: Path) -> str | None:
    """Check all files of a checkpoint. Returns the problems in one line, or ``None``."""
    return "; ".join(problems(checkpoint)) or None


def check_export(source: str | Path) -> None:
    """Raise a ``ValueError`` if ``source`` is the ``hf/`` folder of a checkpoint and does not match the manifest. Any
    other folder or hub id passes."""
    checkpoint, part = Path(source).parent, f"{Path(source).name}/"
    if not (checkpoint / MANIFEST).is_file():
        return
    if damages := problems(checkpoint, part):
        raise ValueError(f"{checkpoint} is damaged: {'; '.join(damages)}. Use an older step_XXXXXXXX of the run")


def _problem(path: Path, name: str, entry: dict[str, Any]) -> str | None:
    try:
        if not path.is_file():
            return f"{name} is missing"
        if not path.resolve().is_relative_to(path.parents[name.count("/")].resolve()):
            return f"{name} is a link to {path.resolve()}, outside the checkpoint"
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
    """Sync a file to disk and return its manifest entry."""
    with naming(path), path.open("rb") as file:
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": hash_file(path)}


def files_in(folder: Path) -> Iterator[str]:
    """Relative paths of all files in a folder, recursively."""
    return (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file())


def write_manifest(partial: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Write the manifest, which marks the folder as complete, and sync all folders."""
    manifest = {"format": FORMAT, "files": dict(sorted(entries.items()))}
    write_synced(partial / MANIFEST, json.dumps(manifest, indent=1))
    for folder in sorted({(partial / name).parent for name in entries} | {partial}):
        sync(folder)


def put_in_place(partial: Path, final: Path) -> None:
    """Rename a complete folder to its final name, replacing an existing one."""
    if final.exists():
        remove_checkpoint(final)
    partial.rename(final)
    sync(final.parent)


def point_latest(folder: Path, name: str) -> None:
    """Write the name of a checkpoint to ``latest``."""
    replace_synced(folder / LATEST, name)


def named_latest(folder: Path) -> Path | None:
    """The checkpoint that ``latest`` names, if it exists."""
    try:
        name = (folder / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return folder / name if STEP.match(name) and (folder / name / MANIFEST).is_file() else None


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint. Renames it first, so that a partly deleted folder is never mistaken for a checkpoint; safe
    if another process deletes it at the same time."""
    doomed = checkpoint.with_suffix(".deleting")
    if doomed.exists():
        remove(doomed, ignore_errors=True)
    try:
        checkpoint.rename(doomed)
    except FileNotFoundError:  # another process was faster
        return
    remove(doomed, ignore_errors=True)
