"""Which checkpoint a run continues from, and whether it may."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from vtprune_train.config.load import changed_settings, differences
from vtprune_train.files.parse import read_json_object
from vtprune_train.pruning import UntrustedMethodError, check_trusted, completed_settings
from vtprune_train.training import distributed as ranks
from vtprune_train.training.checkpoint.folder import CheckpointFolder, TrainerState
from vtprune_train.training.checkpoint.load import load
from vtprune_train.training.engine.engine import Engine

log = logging.getLogger(__name__)


def resume(
    identity: dict[str, Any], policy: str, checkpoints: CheckpointFolder, engine: Engine, config_yaml: str
) -> TrainerState:
    """The newest complete checkpoint of the run loaded into ``engine``, or a fresh start; all ranks call this.

    Args:
        identity: what must not change, by setting.
        policy: ``train.resume``.
        checkpoints: the run's.
        engine: not stepped yet.
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
            identity=identity, world_size=ranks.world_size(), zero_stage=engine.zero_stage, dtype=engine.dtype
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
        raise ValueError(
            "\n".join(
                [
                    f"{checkpoint} was trained with other settings, so its steps would hold other samples than these:",
                    *(f"  {key}: checkpoint {before}, now {now}" for key, before, now in changed),
                    f"Set them back, or start a new run from its weights: run.name=NEW train.init_from={checkpoint}",
                ]
            )
        )


def _completed(pruning: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Recorded pruning settings, as they are where this run does not use their method: they will differ then."""
    try:
        check_trusted(pruning, str(checkpoint))
    except UntrustedMethodError:
        return pruning
    return completed_settings(pruning)
