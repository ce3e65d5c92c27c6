"""Checkpoints that are whole or not there.

A checkpoint is a folder ``step_00001000/``: ``deepspeed/`` (weights and optimizer, every rank its part),
``trainer.json``, ``config.yaml``, ``hf/`` (an export for plain transformers) or ``export/`` (all of an export but its
weights), ``logs/`` (copies of ``metrics.jsonl``, ``eval.jsonl`` and ``spikes.jsonl``) and, last, ``manifest.json`` with
sizes and SHA-256 of all files. It is written beside as ``.partial``, synced, renamed; then ``latest`` names it. A
folder without a matching manifest is never loaded. On several nodes the folder must be on a file system they share.

The loop waits for copies in host memory alone; a thread of every rank writes them (``writing.py``).
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
PATIENCE = 60.0  # seconds that rank 0 gives other ranks' files when the run ends with an error


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; all ranks raise it at the same step, and the one before it is untouched."""


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
    dtype: str = ""  # unknown: an older version wrote the checkpoint
    pruning: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)  # what their state_dict() returned on rank 0, by name


class CheckpointFolder:
    """The ``checkpoints/`` folder of a run.

    Args:
        background: write in a thread; otherwise :meth:`save` returns when all is on disk.
        export: which of them hold an export: ``every``, the ``last`` of the training, or ``never`` one.
    """

    def __init__(self, folder: Path, keep_last: int, background: bool = True, export: str = "every"):
        self.folder, self.keep_last, self.background, self.export = folder, keep_last, background, export
        self._copies = HostCopies()
        self._in_flight: Save | None = None
        self._processor: Any = None
        self.resumed: Path | None = None  # the checkpoint that the run continues from

    def save(
        self,
        engine: Engine,
        processor: Any,
        state: TrainerState,
        config_yaml: str,
        logs: Mapping[str, bytes] = MappingProxyType({}),
        last: bool = False,
    ) -> None:
        """Begin to write one checkpoint (and wait for the one before); all ranks call this at the same step.

        Args:
            processor: saved with the export.
            config_yaml: the run's settings.
            logs: on rank 0, copies of the files that the run writes line by line, by name (see ``JsonLines.copy``).
            last: training is done.

        Raises:
            CheckpointError: this one does not fit on the disk, or the one before could not be written.
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
        own_bytes = self._copies.num_bytes() + sum(map(len, texts.values()))
        own_bytes += plan.num_bytes if exports else 0
        needed = sum(gather(own_bytes)) + SLACK
        self._check_space(partial, needed)
        if self._processor is None:  # the thread's own: a tokenizer must not be used by two threads at once
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
            if exports and weights is None:  # ZeRO-3: no rank has them, but they are in the files of all ranks now
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
        """Whether this rank's part of the save in flight has ended with an error; :meth:`wait` raises it on all."""
        return self._in_flight is not None and self._in_flight.error is not None

    def wait(self) -> None:
        """Wait until the save in flight is published; all ranks call this together.

        Raises:
            CheckpointError: it could not be written, on whichever rank; its folder is removed.
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
        said = f"the checkpoint of step {step} could not be written: {joined(errors)}. {self._rest()}"
        raise raised_on([bool(error) for error in errors].index(True), CheckpointError(said))

    def settle(self) -> None:
        """Let the save in flight end, without other ranks: the run ends with an error that they may not know of."""
        save, self._in_flight = self._in_flight, None
        if save is None:
            return
        save.written.wait()
        if not save.join(PATIENCE):
            save.cancelled.set()
            save.join()
        if save.error is not None:
            log.error("the checkpoint in %s could not be written: %s", save.partial, save.error)

    def _rest(self) -> str:
        newest = self.steps()[-1:]
        rest = f"{newest[0]} is untouched" if newest else "There is none before it"
        return f"{rest}. Mend it (a full disk: lower train.keep_last), start again, and the run goes on from there"

    def _check_space(self, partial: Path, needed: int) -> None:
        """Refuse a checkpoint that would not fit, before a byte of it is written."""

        def free() -> int:
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                shutil.rmtree(partial, ignore_errors=True)
            return free

        found = from_rank_0(free)
        if found < needed:
            said = (
                f"{self.folder} has {found / 1e9:.2f} GB free, the checkpoint of step {manifest.step_of(partial)} "
                f"needs {needed / 1e9:.2f} GB; nothing was written. {self._rest()}"
            )
            raise raised_on(0, CheckpointError(said))

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
        """Finished checkpoints, oldest first (not verified)."""
        return manifest.steps(self.folder)

    def newest_complete(self, strict: bool = False) -> Path | None:
        """The newest checkpoint whose every file is what its manifest says; damaged ones are named and passed over.

        Raises:
            ValueError: there are checkpoints, and all are damaged; with ``strict``: the newest is; or one of its files
                names code, which no damage brings about.
        """

        def find() -> Path | None:
            found = self.steps()
            for checkpoint in reversed(found):
                problem = manifest.verify(checkpoint)
                if problem is None:
                    try:
                        pickles.check_folder(checkpoint / TAG)
                    except pickles.ForeignCodeError as error:
                        raise ValueError(
                            f"{error}. To go on from the checkpoint before, remove {checkpoint}"
                        ) from error
                    return checkpoint
                if strict:
                    raise ValueError(
                        f"checkpoint {checkpoint} is damaged: {problem}. train.resume=auto goes on from the one before"
                    )
                log.warning("checkpoint %s is damaged and passed over: %s", checkpoint, problem)
            if found:
                raise ValueError(
                    f"every checkpoint in {self.folder} is damaged ({', '.join(p.name for p in found)}; `vtprune "
                    "checkpoint verify` says how). To start from the beginning remove them, or use another run.name"
                )
            return None

        return from_rank_0(find)

    def continue_from(self, checkpoint: Path) -> None:
        """Make a checkpoint the newest: what is newer (damaged, or it would have been taken) is renamed, so that it is
        neither counted by keep-last nor in the way when its step comes again, and ``latest`` names it."""

        def rename() -> None:
            for newer in self.steps():
                if manifest.step_of(newer) > manifest.step_of(checkpoint):
                    aside = newer.with_suffix(".damaged")
                    if aside.exists():
                        remove(aside)
                    log.warning("%s is set aside as %s", newer, aside.name)
                    newer.rename(aside)
            if manifest.named_latest(self.folder) != checkpoint:
                log.warning("%s is mended: it names %s now", self.folder / manifest.LATEST, checkpoint.name)
                manifest.point_latest(self.folder, checkpoint.name)

        from_rank_0(rename)
        self.resumed = checkpoint

    def clean(self) -> None:
        """Remove what interrupted saves and deletions left behind."""

        def remove_all() -> None:
            for leftover in [*self.folder.glob("*.partial"), *self.folder.glob("*.deleting")]:
                log.warning("removing %s, left by an interrupted run", leftover)
                remove(leftover)

        from_rank_0(remove_all)

    def warn_of_space(self, engine: Engine, resumed: Path | None) -> None:
        """Say at the start that the next checkpoint will not fit."""
        if rank():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        needed, free = next_size(engine, resumed), shutil.disk_usage(self.folder).free
        if free < needed:
            log.warning(
                "%s has %.2f GB free, a checkpoint needs about %.2f GB: the first save will stop the run",
                self.folder, free / 1e9, needed / 1e9,
            )  # fmt: skip


def next_size(engine: Engine, resumed: Path | None) -> int:
    """About how many bytes the next checkpoint takes: what the one resumed from took, or weights twice (state and
    export) and three float32 numbers for each trained one."""
    if resumed is not None:
        return sum(entry["size"] for entry in manifest.read_manifest(resumed).values())
    weights = trained = 0
    for parameter in engine.module.parameters():
        count = whole_shape(parameter).numel()
        weights += count * parameter.element_size()
        trained += count if parameter.requires_grad else 0
    return 2 * weights + 12 * trained + SLACK


def _write_text(partial: Path, name: str, text: bytes) -> Entries:
    path = partial / name
    path.parent.mkdir(exist_ok=True)
    with naming(path):
        path.write_bytes(text)
    return {name: manifest.sync_and_hash(path)}


def _errors(save: Save) -> list[str]:
    return gather("" if save.error is None else f"{type(save.error).__name__}: {save.error}")


def joined(errors: list[str]) -> str:
    """Each rank's error, the same one of several ranks once."""
    by_text: dict[str, list[int]] = {}
    for number, text in enumerate(errors):
        if text:
            by_text.setdefault(text, []).append(number)
    return "; ".join(f"rank {', '.join(map(str, numbers))}: {text}" for text, numbers in by_text.items())


def _fresh(partial: Path) -> None:
    remove(partial)
    partial.mkdir(parents=True)
