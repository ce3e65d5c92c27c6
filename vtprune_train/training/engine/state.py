"""What DeepSpeed keeps in a checkpoint, collected without writing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Files = list[tuple[Path, Any]]


def collect_files(engine: Any, folder: Path, tag: str, copy: Callable[[Any], Any], trained_only: bool) -> Files:
    """What DeepSpeed would write into ``folder/tag`` now, each file's content by ``copy``; with ``trained_only``
    without frozen parameters. All ranks call this together. Nothing is written (but what an optimizer on NVMe keeps in
    files of its own, which DeepSpeed copies)."""
    files: Files = []

    def keep(state_dict: Any, path: str) -> None:
        files.append((Path(path), copy(state_dict)))

    # Rank 0 alone would write the script, and could fail at it.
    no_script = _replaced(engine, "_copy_recovery_script", lambda save_path: None)
    with _replaced(engine.checkpoint_engine, "save", keep), no_script:
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=trained_only)
    return files


@contextmanager
def _replaced(owner: Any, method: str, by: Callable[..., None]) -> Iterator[None]:
    """Within it, ``owner`` has another method."""
    setattr(owner, method, by)
    try:
        yield
    finally:
        delattr(owner, method)
