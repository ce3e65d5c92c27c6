"""A run's state from one of its checkpoints, whichever form it has and however many ranks wrote it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

from vtprune_train.training.checkpoint import manifest
from vtprune_train.training.checkpoint.folder import TAG, TrainerState, joined
from vtprune_train.training.checkpoint.portable import PORTABLE, PortableFiles
from vtprune_train.training.distributed import gather, rank, world_size
from vtprune_train.training.engine.engine import Engine
from vtprune_train.training.engine.files import DeepSpeedFiles, SavedState
from vtprune_train.training.engine.layout import Layout, layout_name
from vtprune_train.training.engine.weights import holds_only_trained

log = logging.getLogger(__name__)


def open_state(checkpoint: Path) -> SavedState:
    """The state in a checkpoint, whichever form it has.

    Raises:
        ValueError: it has none, or from an older version.
    """
    if (checkpoint / PORTABLE).is_dir():
        return PortableFiles(checkpoint / PORTABLE)
    return DeepSpeedFiles(checkpoint / TAG)


def load(engine: Engine, checkpoint: Path) -> TrainerState:
    """Restore weights and optimizer of every rank, and the trainer's state; all ranks call this.

    If the engine keeps its numbers as the one that wrote them did (ranks, ZeRO stage, dtype, order of parameters),
    DeepSpeed loads its own files, to the bit; otherwise (or from the portable form) the same numbers are distributed
    to this run's ranks. Rates, weight decay and betas are the engine's, not the checkpoint's.

    Args:
        engine: not stepped yet.
        checkpoint: complete.

    Raises:
        ValueError: a rank does not see the files, or they do not fit this model.
    """
    _agree(lambda: _all_there(checkpoint))
    try:
        state = TrainerState(**json.loads((checkpoint / "trainer.json").read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{checkpoint / 'trainer.json'} is not what this version writes ({error})") from error
    now = (world_size(), engine.zero_stage, engine.dtype)
    if _written_alike(state, now, engine, checkpoint):
        engine.load_files(checkpoint, TAG, strict=not holds_only_trained(engine.module))
    else:
        if rank() == 0:
            log.warning(
                "%s was written by %d rank(s) with ZeRO %d in %s; its state is distributed to %d with ZeRO %d in %s",
                checkpoint, state.world_size, state.zero_stage, state.dtype or "an unknown dtype", *now,
            )  # fmt: skip
        engine.load_resharded(checkpoint, open_state, _agree)
    state.world_size, state.zero_stage, state.dtype = now
    return state


def _written_alike(state: TrainerState, now: tuple[int, int, str], engine: Engine, checkpoint: Path) -> bool:
    """Whether DeepSpeed's files hold every number where every rank of this run looks for it."""
    same = (state.world_size, state.zero_stage) == now[:2] and state.dtype in ("", now[2])
    layout = checkpoint / TAG / layout_name(rank())  # older versions wrote none
    same = same and layout.parent.is_dir() and (not layout.is_file() or Layout.read(layout) == engine.layout())
    return all(gather(same))


def _all_there(checkpoint: Path) -> None:
    for name, entry in manifest.read_manifest(checkpoint).items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != entry["size"]:
            raise ValueError(f"{path} is not what rank 0 sees; run.output_dir must be on storage that all nodes share")


def _agree(act: Callable[[], None]) -> None:
    """Do something without collectives on every rank; an error on one rank ends all of them, named."""
    error: Exception | None = None
    try:
        act()
    except Exception as caught:
        error = caught
    errors = gather("" if error is None else f"{type(error).__name__}: {error}")
    if any(errors):
        raise ValueError(joined(errors)) from error
