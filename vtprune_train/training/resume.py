"""Which checkpoint a run continues from, and whether it may."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from vtprune_train.training import distributed as ranks
from vtprune_train.training.checkpoint import CheckpointFolder, TrainerState, load

log = logging.getLogger(__name__)


def resume(
    identity: dict[str, Any], policy: str, checkpoints: CheckpointFolder, engine: Any, stage: int
) -> TrainerState:
    """The newest complete checkpoint of the run loaded into ``engine``, or a fresh start; all ranks call this.

    Args:
        identity: what must not change, by setting.
        policy: ``train.resume``.
        checkpoints: the run's.
        engine: not stepped yet.
        stage: its ZeRO stage.

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
        state = TrainerState(identity=identity, world_size=ranks.world_size(), zero_stage=stage)
    else:
        checkpoints.continue_from(newest)
        state = load(engine, newest)
        if ranks.rank() == 0:
            log.info("resuming from %s", newest)
    checkpoints.warn_of_space(engine, newest)
    return state


def _check_identity(checkpoint: Path, identity: dict[str, Any]) -> None:
    saved = ranks.from_rank_0(lambda: json.loads((checkpoint / "trainer.json").read_text())["identity"])
    changed = [key for key, value in identity.items() if saved.get(key) != value]
    if changed:
        lines = [f"{key}: checkpoint {saved.get(key)!r}, now {identity[key]!r}" for key in changed]
        raise ValueError(
            f"{checkpoint} was trained with other settings, so its steps would hold other samples: {'; '.join(lines)}. "
            f"Set them back, or start a new run from its weights: run.name=NEW train.init_from={checkpoint}"
        )
