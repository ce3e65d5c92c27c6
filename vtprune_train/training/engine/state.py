"""What DeepSpeed keeps in a checkpoint: collected without writing it, and loaded by the ranks that wrote it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vtprune_train.files import pickles
from vtprune_train.training.engine.files import scaler_numbers
from vtprune_train.training.engine.reshard import fill_scaler

Files = list[tuple[Path, Any]]


def collect_files(engine: Any, folder: Path, tag: str, copy: Callable[[Any], Any], trained_only: bool) -> Files:
    """What DeepSpeed would write into ``folder`` now; all ranks call this together. Nothing is written (but what an
    optimizer on NVMe keeps in files of its own, which DeepSpeed copies).

    Args:
        engine: DeepSpeed's.
        folder: the checkpoint's.
        tag: the folder inside it.
        copy: makes the copy that is kept of a file's content.
        trained_only: leave frozen parameters out.
    """
    files: Files = []

    def keep(state_dict: Any, path: str) -> None:
        files.append((Path(path), copy(state_dict)))

    def no_script(save_path: str) -> None:  # rank 0 alone would write it, and could fail at it
        del save_path

    with _replaced(engine.checkpoint_engine, "save", keep), _replaced(engine, "_copy_recovery_script", no_script):
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


def load_files(engine: Any, folder: Path, tag: str, strict: bool) -> None:
    """Load what :func:`collect_files` gave as many ranks of the same ZeRO stage and dtype; all ranks call this. Rates,
    weight decay and betas stay the engine's.

    Args:
        engine: DeepSpeed's, not stepped yet.
        folder: the checkpoint's.
        tag: the folder inside it.
        strict: the files hold every parameter.

    Raises:
        ValueError: there is nothing to load.
    """
    groups = engine.optimizer.param_groups
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    with pickles.for_torch_load(lambda state: _with_scaler(state, engine.optimizer)):
        loaded, _ = engine.load_checkpoint(str(folder), tag=tag, load_module_strict=strict)
    if loaded is None:
        raise ValueError(f"DeepSpeed found nothing to load in {folder / tag}")
    for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(own)


def _with_scaler(state: Any, optimizer: Any) -> Any:
    """A file's content with the optimizer's own loss scaler, which takes the numbers of the one in the file."""
    inner = state.get("optimizer_state_dict") if isinstance(state, dict) else None
    if isinstance(inner, dict) and "loss_scaler" in inner:
        fill_scaler(optimizer, scaler_numbers(inner["loss_scaler"]))
        inner["loss_scaler"] = optimizer.loss_scaler
    return state
