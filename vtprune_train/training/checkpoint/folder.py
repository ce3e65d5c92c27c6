"""Atomic checkpoints.

A checkpoint is a folder ``step_00001000/`` with ``deepspeed/`` (each rank's shards of weights and optimizer states),
``trainer.json``, ``config.yaml``, ``hf/`` (an export for plain transformers) or ``export/`` (an export without its
weights), ``logs/`` (copies of ``metrics.jsonl``, ``eval.jsonl`` and ``spikes.jsonl``) and ``manifest.json`` with the
size and SHA-256 of every file. It is written to a ``.partial`` folder, synced and renamed; then ``latest`` is updated.
A folder that does not match its manifest is never loaded. On several nodes the folder must be on a shared file system.

The training loop waits only for copies to host memory; a thread of every rank writes them (:mod:`writing`).
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vtprune_train.files import pickles
from vtprune_train.files.disk import naming, remove
from vtprune_train.models.io.export import EXPORT, UNEXPORTED, Plan, write_weights
from vtprune_train.models.io.placement import whole_shape
from vtprune_train.training.checkpoint import manifest
from vtprune_train.training.checkpoint.writing import Entries, Save, write_file
from vtprune_train.training.distributed import from_rank_0, gather, raised_on, rank
from vtprune_train.training.engine.engine import Engine
from vtprune_train.training.engine.files import DeepSpeedFiles, weight
from vtprune_train.training.engine.layout import layout_name
from vtprune_train.training.engine.weights import export_plan, full_state_dict, holds_only_trained, write_export
from vtprune_train.training.memory.pinned import HostCopies

log = logging.getLogger(__name__)

TAG = "deepspeed"
SLACK = 64 * 2**20  # tokenizer, configs, headers of files
PATIENCE = 60.0  # seconds that rank 0 waits for other ranks' files when the run ends with an error


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. All ranks raise this at the same step; earlier checkpoints are unchanged."""


@dataclass
class TrainerState:
    """Training progress: ``step`` global steps are done, which also determines the position in the data. ``skipped`` of
    them were skipped by a guard (the last ``skipped_in_a_row`` in a row) and ``overflows`` by float16 loss scaling,
    without an update. ``pruning`` is the state of the pruning schedule, for information: it follows from the settings
    and the step."""

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    overflows: int = 0
    unreadable: list[str] = field(default_factory=list)
    identity: dict[str, Any] = field(default_factory=dict)
    world_size: int = 1
    zero_stage: int = 0
    dtype: str = ""  # empty if an older version wrote the checkpoint
    optimizer: str = "adamw"  # the only one in older versions
    pruning: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)  # by name: what state_dict() returned on rank 0


class CheckpointFolder:
    """The ``checkpoints/`` folder of a run.

    Args:
        folder: created by the first save.
        keep_last: number of checkpoints to keep.
        background: write in a thread; otherwise :meth:`save` returns after all files are on disk.
        export: which checkpoints contain an export: ``every``, only the ``last`` of the training, or ``never``.
    """

    def __init__(self, folder: Path, keep_last: int, background: bool = True, export: str = "every"):
        self.folder, self.keep_last, self.background, self.export = folder, keep_last, background, export
        self._copies = HostCopies()
        self._in_flight: Save | None = None
        self._processor: Any = None
        self.resumed: Path | None = None  # the checkpoint that this run resumed from

    def save(
        self,
        engine: Engine,
        processor: Any,
        state: TrainerState,
        config_yaml: str,
        logs: Mapping[str, bytes] = MappingProxyType({}),
        last: bool = False,
    ) -> None:
        """Start writing a checkpoint, after waiting for the previous one; all ranks call this at the same step.

        Args:
            processor: saved with the export.
            config_yaml: the run's settings.
            logs: on rank 0, copies of the run's JSON Lines files by name (see ``JsonLines.copy``).
            last: whether training is complete.

        Raises:
            CheckpointError: this checkpoint does not fit on the disk, or the previous one could not be written.
        """
        self.wait()
        partial = self.folder / f"step_{state.step:08d}.partial"
        from_rank_0(lambda: _fresh(partial))
        self._copies.begin()
        files = engine.state_files(partial, TAG, self._copies.copy, holds_only_trained(engine.module))
        exports = self.export == "every" or (self.export == "last" and last)
        weights = self._copies.copy(full_state_dict(engine)) if exports else None
        self._copies.finish()
        plan = export_plan(engine.module) if rank() == 0 else Plan({})
        texts = {"trainer.json": json.dumps(asdict(state), indent=1).encode(), "config.yaml": config_yaml.encode()}
        texts |= {f"{manifest.LOGS}/{name}.gz": copied for name, copied in logs.items()}
        num_bytes = self._copies.num_bytes() + sum(map(len, texts.values()))
        num_bytes += plan.num_bytes if exports else 0
        needed = sum(gather(num_bytes)) + SLACK
        self._check_space(partial, needed)
        if self._processor is None:  # a copy for the thread: two threads must not use a tokenizer at once
            self._processor = copy.deepcopy(processor)
        layout = f"{TAG}/{layout_name(rank())}", engine.layout().to_json()

        def write() -> Entries:
            entries = {}
            for path, content in files:
                path.parent.mkdir(parents=True, exist_ok=True)
                entries[str(path.relative_to(partial))] = write_file(path, content)
            entries.update(_write_text(partial, *layout))
            if rank() == 0:
                folder = partial / (EXPORT if exports else UNEXPORTED)
                with naming(folder):
                    write_export(engine.module, self._processor, weights, folder)
                    if not exports:
                        plan.save(folder)
                for name, text in texts.items():
                    entries.update(_write_text(partial, name, text))
            return entries

        def publish(entries: Entries) -> None:
            if exports and weights is None:  # ZeRO-3: no rank has them, but the written files contain them
                saved = DeepSpeedFiles(partial / TAG)
                with naming(partial / EXPORT):
                    write_weights(plan, partial / EXPORT, lambda stored: weight(saved, stored))
            self._publish(partial, entries)

        self._in_flight = Save(partial, write, publish)
        self._in_flight.start()
        if not self.background:
            self.wait()

    @property
    def failed(self) -> bool:
        """Whether this rank's part of the save in progress failed; :meth:`wait` raises its error on all ranks."""
        return self._in_flight is not None and self._in_flight.error is not None

    def wait(self) -> None:
        """Wait until the save in progress is published; all ranks call this together.

        Raises:
            CheckpointError: it failed on any rank; its folder is removed.
        """
        save, self._in_flight = self._in_flight, None
        if save is None:
            return
        save.written.wait()
        errors = _errors(save)
        if not any(errors):
            save.join()
            errors = _errors(save)
        if not any(errors):
            return
        save.cancelled.set()
        save.join()
        from_rank_0(lambda: shutil.rmtree(save.partial, ignore_errors=True))
        step = manifest.step_of(save.partial)
        message = f"the checkpoint of step {step} could not be written: {joined(errors)}. {self._how_to_continue()}"
        raise raised_on([bool(error) for error in errors].index(True), CheckpointError(message))

    def settle(self) -> None:
        """Wait for the save in progress without other ranks, because the run ends with an error that they may not know
        of."""
        save, self._in_flight = self._in_flight, None
        if save is None:
            return
        save.written.wait()
        if not save.join(PATIENCE):
            save.cancelled.set()
            save.join()
        if save.error is not None:
            log.error("the checkpoint in %s could not be written: %s", save.partial, save.error)

    def _how_to_continue(self) -> str:
        newest = self.steps()[-1:]
        kept = f"{newest[0]} is unchanged" if newest else "There is no earlier checkpoint"
        return f"{kept}. Fix the problem (disk full: lower train.keep_last) and run the same command again to continue"

    def _check_space(self, partial: Path, needed: int) -> None:
        """Raise a ``CheckpointError`` if the checkpoint does not fit on the disk, before writing any of it."""

        def free() -> int:
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                shutil.rmtree(partial, ignore_errors=True)
            return free

        available = from_rank_0(free)
        if available < needed:
            message = (
                f"{self.folder} has {available / 1e9:.2f} GB free, but the checkpoint of step "
                f"{manifest.step_of(partial)} needs {needed / 1e9:.2f} GB; nothing was written. "
                f"{self._how_to_continue()}"
            )
            raise raised_on(0, CheckpointError(message))

    def _publish(self, partial: Path, entries: Entries) -> None:
        others = (name for name in manifest.files_in(partial) if name not in entries)
        entries.update({name: manifest.sync_and_hash(partial / name) for name in others})
        final = partial.with_suffix("")
        manifest.write_manifest(partial, entries)
        manifest.put_in_place(partial, final)
        manifest.point_latest(self.folder, final.name)
        for old in self.steps()[: -self.keep_last]:
            manifest.remove_checkpoint(old)

    def steps(self) -> list[Path]:
        """Published checkpoints, oldest first, not verified."""
        return manifest.steps(self.folder)

    def newest_complete(self, strict: bool = False) -> Path | None:
        """The newest checkpoint that matches its manifest; damaged ones are skipped with a warning.

        Raises:
            ValueError: all checkpoints are damaged; with ``strict``, the newest one is; or opening a file of the
                checkpoint would run code, which cannot be due to damage.
        """

        def find() -> Path | None:
            checkpoints = self.steps()
            for checkpoint in reversed(checkpoints):
                problem = manifest.verify(checkpoint)
                if problem is None:
                    try:
                        pickles.check_folder(checkpoint / TAG)
                    except pickles.ForeignCodeError as error:
                        raise ValueError(
                            f"{error}. To continue from the previous checkpoint, remove {checkpoint}"
                        ) from error
                    return checkpoint
                if strict:
                    raise ValueError(
                        f"checkpoint {checkpoint} is damaged: {problem}. train.resume=auto continues from the previous "
                        "one"
                    )
                log.warning("checkpoint %s is damaged, skipping it: %s", checkpoint, problem)
            if checkpoints:
                raise ValueError(
                    f"every checkpoint in {self.folder} is damaged ({', '.join(p.name for p in checkpoints)}; `vtprune "
                    "checkpoint verify` shows the details). To start from scratch, remove them or set another run.name"
                )
            return None

        return from_rank_0(find)

    def continue_from(self, checkpoint: Path) -> None:
        """Make a checkpoint the newest: rename newer ones, which are damaged, so that they do not count for
        ``keep_last`` and their steps can be saved again, and update ``latest``."""

        def rename() -> None:
            for newer in self.steps():
                if manifest.step_of(newer) > manifest.step_of(checkpoint):
                    aside = newer.with_suffix(".damaged")
                    if aside.exists():
                        remove(aside)
                    log.warning("renaming %s to %s", newer, aside.name)
                    newer.rename(aside)
            if manifest.named_latest(self.folder) != checkpoint:
                log.warning("repaired %s: it now names %s", self.folder / manifest.LATEST, checkpoint.name)
                manifest.point_latest(self.folder, checkpoint.name)

        from_rank_0(rename)
        self.resumed = checkpoint

    def clean(self) -> None:
        """Remove leftovers of interrupted saves and deletions."""

        def remove_all() -> None:
            for leftover in [*self.folder.glob("*.partial"), *self.folder.glob("*.deleting")]:
                log.warning("removing %s, a leftover of an interrupted run", leftover)
                remove(leftover)

        from_rank_0(remove_all)

    def warn_of_space(self, engine: Engine, resumed: Path | None) -> None:
        """Warn at the start if the next checkpoint will not fit on the disk."""
        if rank():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        needed, free = next_size(engine, resumed), shutil.disk_usage(self.folder).free
        if free < needed:
            log.warning(
                "%s has %.2f GB free, but a checkpoint needs about %.2f GB: the first save will stop the run",
                self.folder, free / 1e9, needed / 1e9,
            )  # fmt: skip


def next_size(engine: Engine, resumed: Path | None) -> int:
    """Estimated bytes of the next checkpoint: the size of the one resumed from, or all weights twice (state and
    export), float32 copies of the trained weights, and the optimizer's states."""
    if resumed is not None:
        return sum(entry["size"] for entry in manifest.read_manifest(resumed).values())
    weights = trained = 0
    for parameter in engine.module.parameters():
        count = whole_shape(parameter).numel()
        weights += count * parameter.element_size()
        trained += count if parameter.requires_grad else 0
    return 2 * weights + 4 * trained + engine.state_bytes() + SLACK


def _write_text(partial: Path, name: str, text: bytes) -> Entries:
    path = partial / name
    path.parent.mkdir(exist_ok=True)
    with naming(path):
        path.write_bytes(text)
    return {name: manifest.sync_and_hash(path)}


def _errors(save: Save) -> list[str]:
    return gather("" if save.error is None else f"{type(save.error).__name__}: {save.error}")


def joined(errors: list[str]) -> str:
    """Join the errors of ranks, listing equal ones once."""
    by_text: dict[str, list[int]] = {}
    for number, text in enumerate(errors):
        if text:
            by_text.setdefault(text, []).append(number)
    return "; ".join(f"rank {', '.join(map(str, numbers))}: {text}" for text, numbers in by_text.items())


def _fresh(partial: Path) -> None:
    remove(partial)
    partial.mkdir(parents=True)
