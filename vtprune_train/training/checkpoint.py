"""Checkpoints that are whole or not there.

A checkpoint is a folder ``step_00001000/``: ``deepspeed/`` (weights and optimizer, every rank its part),
``trainer.json``, ``config.yaml``, ``hf/`` (an export for plain transformers) and, last, ``manifest.json`` with sizes
and SHA-256 of all files. It is written beside as ``.partial``, synced, renamed; then ``latest`` names it. A folder
without a matching manifest is never loaded. On several nodes the folder must be on a file system they share.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vtprune_train.training.distributed import barrier, from_rank_0, gather, rank, world_size
from vtprune_train.training.weights import full_state_dict, write_export

log = logging.getLogger(__name__)

STEP = re.compile(r"^step_(\d{8,})$")
TAG = "deepspeed"
MANIFEST = "manifest.json"
FORMAT = 1


@dataclass
class TrainerState:
    """Where training stands: ``step`` global steps are done (which is also the data position). ``skipped`` of them were
    left out by a guard, the last ``skipped_in_a_row`` without one between, and ``overflows`` by float16's loss scaling:
    they changed nothing. ``pruning`` is where a schedule of several phases stands (for the reader: it follows from the
    settings and the step)."""

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    overflows: int = 0
    unreadable: list[str] = field(default_factory=list)
    identity: dict[str, Any] = field(default_factory=dict)
    world_size: int = 1
    zero_stage: int = 0
    pruning: dict[str, Any] = field(default_factory=dict)


class CheckpointFolder:
    """The ``checkpoints/`` folder of a run."""

    def __init__(self, folder: Path, keep_last: int):
        self.folder, self.keep_last = folder, keep_last

    def save(self, engine: Any, processor: Any, state: TrainerState, config_yaml: str) -> Path:
        """Write one checkpoint; all ranks call this at the same step. Returns its folder."""
        final = self.folder / f"step_{state.step:08d}"
        partial = final.with_suffix(".partial")
        from_rank_0(lambda: _fresh(partial))
        engine.save_checkpoint(str(partial), tag=TAG, save_latest=False)
        weights = full_state_dict(engine)
        if rank() == 0:
            write_export(engine.module, processor, weights, partial / "hf")
            (partial / "trainer.json").write_text(json.dumps(asdict(state), indent=1))
            (partial / "config.yaml").write_text(config_yaml)
        barrier()
        files = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
        own = {name: _sync_and_hash(partial / name) for name in files[rank() :: world_size()]}
        entries = {name: entry for part in gather(own) for name, entry in part.items()}
        from_rank_0(lambda: self._publish(partial, final, entries))
        return final

    def _publish(self, partial: Path, final: Path, entries: dict[str, dict[str, Any]]) -> None:
        manifest = {"format": FORMAT, "files": dict(sorted(entries.items()))}
        _write_synced(partial / MANIFEST, json.dumps(manifest, indent=1))
        for folder in sorted({(partial / name).parent for name in entries} | {partial}):
            _sync_folder(folder)
        if final.exists():
            _remove(final)
        partial.rename(final)
        _sync_folder(self.folder)
        _write_synced(self.folder / "latest.tmp", final.name)
        (self.folder / "latest.tmp").rename(self.folder / "latest")
        _sync_folder(self.folder)
        for old in self.steps()[: -self.keep_last]:
            _remove(old)

    def steps(self) -> list[Path]:
        """Finished checkpoints, oldest first (not verified)."""
        if not self.folder.is_dir():
            return []
        return sorted(
            (path for path in self.folder.iterdir() if STEP.match(path.name) and (path / MANIFEST).is_file()),
            key=lambda path: int(path.name.removeprefix("step_")),
        )

    def newest_complete(self) -> Path | None:
        """The newest checkpoint whose every file is what its manifest says; damaged ones are named and passed over."""

        def find() -> Path | None:
            for checkpoint in reversed(self.steps()):
                problem = verify(checkpoint)
                if problem is None:
                    return checkpoint
                log.warning("checkpoint %s is damaged and passed over: %s", checkpoint, problem)
            return None

        return from_rank_0(find)

    def set_aside_newer(self, checkpoint: Path | None) -> None:
        """Rename what is newer than the checkpoint that training continues from (damaged, or it would have been
        taken), so that it is neither counted by keep-last nor in the way when its step comes again."""

        def rename() -> None:
            for newer in self.steps():
                if checkpoint is None or newer.name > checkpoint.name:
                    aside = newer.with_suffix(".damaged")
                    if aside.exists():
                        shutil.rmtree(aside)
                    log.warning("%s is set aside as %s", newer, aside.name)
                    newer.rename(aside)

        from_rank_0(rename)

    def clean(self) -> None:
        """Remove what interrupted saves and deletions left behind."""

        def remove() -> None:
            if self.folder.is_dir():
                for leftover in [*self.folder.glob("*.partial"), *self.folder.glob("*.deleting")]:
                    log.warning("removing %s, left by an interrupted run", leftover)
                    shutil.rmtree(leftover)

        from_rank_0(remove)


def verify(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or ``None``."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, entry in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
        if _hash(path) != entry["sha256"]:
            return f"{name} does not have the recorded SHA-256"
    return None


def load(engine: Any, checkpoint: Path) -> TrainerState:
    """Restore weights and optimizer of every rank, and the trainer's state.

    Raises:
        ValueError: the checkpoint was written by another number of ranks or ZeRO stage.
    """
    state = TrainerState(**json.loads((checkpoint / "trainer.json").read_text()))
    stage = int(engine.zero_optimization_stage())
    if (state.world_size, state.zero_stage) != (world_size(), stage):
        raise ValueError(
            f"{checkpoint} was written by {state.world_size} rank(s) with ZeRO {state.zero_stage}, this run has "
            f"{world_size()} with ZeRO {stage}; resume with the same, or start from its weights with "
            f"train.init_from={checkpoint}"
        )
    loaded, _ = engine.load_checkpoint(str(checkpoint), tag=TAG)
    if loaded is None:
        raise ValueError(f"DeepSpeed found nothing to load in {checkpoint / TAG}")
    return state


def _fresh(partial: Path) -> None:
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def _remove(checkpoint: Path) -> None:
    """Delete so that a half-deleted folder is never taken for a checkpoint."""
    doomed = checkpoint.with_suffix(".deleting")
    if doomed.exists():
        shutil.rmtree(doomed)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _sync_and_hash(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": _hash(path)}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
