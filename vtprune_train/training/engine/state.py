"""Collect what DeepSpeed would write to a checkpoint, without writing it."""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepspeed.runtime.zero.config import ZeroStageEnum

Files = list[tuple[Path, Any]]

# Older releases of Python 3.11 (3.11.2, for example) pickle a member of an enumeration as a call of getattr, which
# vtprune_train.files.pickles refuses to read; others pickle it as a call of its class.
copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (int(stage),)))  # type: ignore[arg-type]


def collect_files(engine: Any, folder: Path, tag: str, copy: Callable[[Any], Any], trained_only: bool) -> Files:
    """Collect the files that DeepSpeed would write to ``folder/tag``; all ranks call this together.

    Nothing is written, except for optimizer states on NVMe, whose files DeepSpeed copies.

    Args:
        engine: DeepSpeed's.
        folder, tag: where the files belong.
        copy: applied to the content of each file.
        trained_only: leave out frozen parameters.

    Returns:
        (path, content) of each file of this rank.
    """
    files: Files = []

    def keep(state_dict: Any, path: str) -> None:
        files.append((Path(path), copy(state_dict)))

    # Only rank 0 would write the script, and writing it could fail.
    no_script = _replaced(engine, "_copy_recovery_script", lambda save_path: None)
    with _replaced(engine.checkpoint_engine, "save", keep), no_script:
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=trained_only)
    return files


@contextmanager
def _replaced(owner: Any, method: str, by: Callable[..., None]) -> Iterator[None]:
    """Context manager in which ``by`` replaces a method of ``owner``."""
    setattr(owner, method, by)
    try:
        yield
    finally:
        delattr(owner, method)
