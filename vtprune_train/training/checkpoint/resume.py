"""Resuming: choose a checkpoint, check that the settings are compatible, and load its state on any number of ranks."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vtprune_train.config.load import changed_settings, differences
from vtprune_train.files.parse import read_json_object
from vtprune_train.pruning import UntrustedMethodError, check_trusted, completed_settings
from vtprune_train.training import distributed as ranks
from vtprune_train.training.checkpoint import manifest
from vtprune_train.training.checkpoint.folder import TAG, CheckpointFolder, TrainerState, joined
from vtprune_train.training.checkpoint.portable import open_state
from vtprune_train.training.engine.engine import Engine
from vtprune_train.training.engine.layout import Layout, layout_name
from vtprune_train.training.engine.weights import holds_only_trained

log = logging.getLogger(__name__)


def resume(
    identity: dict[str, Any], policy: str, checkpoints: CheckpointFolder, engine: Engine, config_yaml: str
) -> TrainerState:
    """Load the newest complete checkpoint of the run into ``engine``, or start from scratch; all ranks call this.

    Args:
        identity: settings that must not change.
        policy: ``train.resume``.
        checkpoints: the run's checkpoints.
        engine: the engine, before its first step.
        config_yaml: the run's settings; those that differ from the checkpoint's are logged.

    Raises:
        ValueError: the checkpoints do not fit these settings, or all of them are damaged (with ``strict``: the newest
            one is).
    """
    if policy == "never" and (existing := ranks.from_rank_0(checkpoints.steps)):
        raise ValueError(
            f"{existing[-1]} exists, but train.resume=never; set another run.name or remove {checkpoints.folder}"
        )
    newest = checkpoints.newest_complete(strict=policy == "strict")
    if newest is not None:
        _check_identity(newest, identity)
    checkpoints.clean()
    if newest is None:
        state = TrainerState(
            identity=identity,
            world_size=ranks.world_size(),
            zero_stage=engine.zero_stage,
            dtype=engine.dtype,
            optimizer=engine.optimizer_name,
        )
    else:
        checkpoints.continue_from(newest)
        state = load(engine, newest)
        if ranks.rank() == 0:
            log.info("resuming from %s", newest)
            for line in changed_settings((newest / "config.yaml").read_text(), config_yaml):
                log.warning("changed since that checkpoint: %s", line)
    checkpoints.warn_of_space(engine, newest)
    return state


def _check_identity(checkpoint: Path, identity: dict[str, Any]) -> None:
    saved = ranks.from_rank_0(lambda: read_json_object(checkpoint / "trainer.json")["identity"])
    known = {key: value for key, value in saved.items() if key in identity}
    if (unknown := [key for key in identity if key not in saved]) and ranks.rank() == 0:
        log.warning(
            "%s was saved by an older version without %s: earlier steps may have been trained on different tokens than "
            "later ones", checkpoint, ", ".join(unknown),
        )  # fmt: skip
    identity = {key: value for key, value in identity.items() if key in saved}
    if "pruning" in known:
        known["pruning"] = _completed(known["pruning"], checkpoint)
    if changed := differences(_comparable(known), _comparable(json.loads(json.dumps(identity)))):
        if any(key == "pruning.method" for key, _, _ in changed):  # other settings belong to their methods
            changed = [line for line in changed if line[0] == "pruning.method" or not line[0].startswith("pruning.")]
        lines = [
            f"{checkpoint} was trained with other settings, which would change what its steps compute:",
            *(f"  {key}: checkpoint {before}, now {now}" for key, before, now in changed),
            f"Restore them, or start a new run from its weights: run.name=NEW train.init_from={checkpoint}",
        ]
        raise ValueError("\n".join(lines))


def _comparable(identity: dict[str, Any]) -> dict[str, Any]:
    """``identity`` with the class of each reader instead of its path, because a file may move, and without keys that
    are not set, which older versions may not have."""
    sources = [
        {
            key: value.rpartition(":")[2] if key == "reader" else value
            for key, value in source.items()
            if value is not None
        }
        for source in identity.get("data.train", [])
    ]
    return {**identity, **({"data.train": sources} if sources else {})}


def _completed(pruning: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Recorded pruning settings with defaults filled in; unchanged if their method is untrusted, because this run does
    not use it."""
    try:
        check_trusted(pruning, str(checkpoint))
    except UntrustedMethodError:
        return pruning
    return completed_settings(pruning)


def load(engine: Engine, checkpoint: Path) -> TrainerState:
    """Restore weights, optimizer states and the trainer's state; all ranks call this before the first step.

    If the engine has the same layout as the one that wrote the checkpoint (ranks, ZeRO stage, dtype, order of
    parameters), DeepSpeed loads its own files. Otherwise, or from the portable form, the same numbers are distributed
    to this run's ranks. Learning rates, weight decay and betas are those of this run.

    Raises:
        ValueError: a rank cannot read the files, or they do not fit this model or optimizer.
    """
    _agree(lambda: _all_there(checkpoint))
    try:
        state = TrainerState(**json.loads((checkpoint / "trainer.json").read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{checkpoint / 'trainer.json'} cannot be read by this version ({error})") from error
    if (saved := state.optimizer.rpartition(":")[2]) != engine.optimizer_name.rpartition(":")[2]:  # a file may move
        raise ValueError(
            f"{checkpoint} was trained with train.optimizer={state.optimizer}, now it is {engine.optimizer_name}, "
            f"which cannot use the states of {saved}. Restore it, or start a new run from its weights: "
            f"run.name=NEW train.init_from={checkpoint}"
        )
    now = (ranks.world_size(), engine.zero_stage, engine.dtype)
    if _written_alike(state, now, engine, checkpoint):
        engine.load_files(checkpoint, TAG, strict=not holds_only_trained(engine.module))
    else:
        if ranks.rank() == 0 and (state.world_size, state.zero_stage, state.dtype) != now:
            log.warning(
                "%s was written by %d rank(s) with ZeRO %d in %s; distributing its state to %d with ZeRO %d in %s",
                checkpoint, state.world_size, state.zero_stage, state.dtype or "an unknown dtype", *now,
            )  # fmt: skip
        engine.load_resharded(checkpoint, open_state, _agree)
    _agree(engine.check_states)
    state.world_size, state.zero_stage, state.dtype = now
    state.optimizer = engine.optimizer_name
    return state


def _written_alike(state: TrainerState, now: tuple[int, int, str], engine: Engine, checkpoint: Path) -> bool:
    """Whether every rank of this run has the layout of the rank that wrote its files."""
    same = (state.world_size, state.zero_stage) == now[:2] and state.dtype in ("", now[2])
    layout = checkpoint / TAG / layout_name(ranks.rank())  # older versions did not write one
    same = same and layout.parent.is_dir() and (not layout.is_file() or Layout.read(layout) == engine.layout())
    return all(ranks.gather(same))


def _all_there(checkpoint: Path) -> None:
    for name, entry in manifest.read_manifest(checkpoint).items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != entry["size"]:
            raise ValueError(
                f"{path} differs from what rank 0 sees; run.output_dir must be on storage shared by all nodes"
            )


def _agree(act: Callable[[], None]) -> None:
    """Run ``act``, which uses no collectives, on every rank. If it fails on any, raise an error on all ranks that names
    the failed ones, unless all failed alike."""
    error: Exception | None = None
    try:
        act()
    except Exception as caught:
        error = caught
    message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    errors = ranks.gather("" if error is None else message)
    if any(errors):
        raise ValueError(errors[0] if len(set(errors)) == 1 else joined(errors)) from error
