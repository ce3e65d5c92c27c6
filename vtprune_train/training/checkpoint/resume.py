"""Which checkpoint a run continues from, whether it may, and its state loaded however many ranks wrote it."""

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
    """The newest complete checkpoint of the run loaded into ``engine``, or a fresh start; all ranks call this.

    Args:
        identity: what must not change, by setting.
        policy: ``train.resume``.
        config_yaml: the run's settings, as checkpoints record them; those that have changed are logged.

    Raises:
        ValueError: the run's folder holds checkpoints that must not be continued with these settings, or only damaged
            ones (with ``strict``: a damaged newest one).
    """
    if policy == "never" and (found := ranks.from_rank_0(checkpoints.steps)):
        raise ValueError(
            f"{found[-1]} exists and train.resume is never; use another run.name, or remove {checkpoints.folder}"
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
            "%s was saved by an older version, which did not have %s: the steps before it may have been trained on "
            "other tokens than the next ones", checkpoint, ", ".join(unknown),
        )  # fmt: skip
    identity = {key: value for key, value in identity.items() if key in saved}
    if "pruning" in known:
        known["pruning"] = _completed(known["pruning"], checkpoint)
    if changed := differences(known, json.loads(json.dumps(identity))):
        lines = [
            f"{checkpoint} was trained with other settings, so its steps would hold other samples than these:",
            *(f"  {key}: checkpoint {before}, now {now}" for key, before, now in changed),
            f"Set them back, or start a new run from its weights: run.name=NEW train.init_from={checkpoint}",
        ]
        raise ValueError("\n".join(lines))


def _completed(pruning: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Recorded pruning settings, as they are where this run does not use their method: they will differ then."""
    try:
        check_trusted(pruning, str(checkpoint))
    except UntrustedMethodError:
        return pruning
    return completed_settings(pruning)


def load(engine: Engine, checkpoint: Path) -> TrainerState:
    """Restore weights and optimizer of every rank, and the trainer's state; all ranks call this.

    If the engine keeps its numbers as the one that wrote them did (ranks, ZeRO stage, dtype, order of parameters),
    DeepSpeed loads its own files, to the bit; otherwise (or from the portable form) the same numbers are distributed
    to this run's ranks. Rates, weight decay and betas are the engine's, which is not stepped yet.

    Raises:
        ValueError: a rank does not see the files, or they do not fit this model.
    """
    _agree(lambda: _all_there(checkpoint))
    try:
        state = TrainerState(**json.loads((checkpoint / "trainer.json").read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{checkpoint / 'trainer.json'} is not what this version writes ({error})") from error
    if (saved := state.optimizer.rpartition(":")[2]) != engine.optimizer_name.rpartition(":")[2]:  # a file may move
        raise ValueError(
            f"{checkpoint} was trained with train.optimizer={state.optimizer}, now it is {engine.optimizer_name}, "
            f"which does not continue the states of {saved}. Set it back, or start a new run from its weights: "
            f"run.name=NEW train.init_from={checkpoint}"
        )
    now = (ranks.world_size(), engine.zero_stage, engine.dtype)
    if _written_alike(state, now, engine, checkpoint):
        engine.load_files(checkpoint, TAG, strict=not holds_only_trained(engine.module))
    else:
        if ranks.rank() == 0:
            log.warning(
                "%s was written by %d rank(s) with ZeRO %d in %s; its state is distributed to %d with ZeRO %d in %s",
                checkpoint, state.world_size, state.zero_stage, state.dtype or "an unknown dtype", *now,
            )  # fmt: skip
        engine.load_resharded(checkpoint, open_state, _agree)
    _agree(engine.check_states)
    state.world_size, state.zero_stage, state.dtype = now
    state.optimizer = engine.optimizer_name
    return state


def _written_alike(state: TrainerState, now: tuple[int, int, str], engine: Engine, checkpoint: Path) -> bool:
    """Whether DeepSpeed's files hold every number where every rank of this run looks for it."""
    same = (state.world_size, state.zero_stage) == now[:2] and state.dtype in ("", now[2])
    layout = checkpoint / TAG / layout_name(ranks.rank())  # older versions wrote none
    same = same and layout.parent.is_dir() and (not layout.is_file() or Layout.read(layout) == engine.layout())
    return all(ranks.gather(same))


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
    errors = ranks.gather("" if error is None else f"{type(error).__name__}: {error}")
    if any(errors):
        raise ValueError(joined(errors)) from error
