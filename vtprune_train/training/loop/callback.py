"""The base class of callbacks, and the part of the trainer that they may use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from vtprune_train.core.user_code import path_of

if TYPE_CHECKING:
    import torch

    from vtprune_train.config.settings import Config
    from vtprune_train.core.stream import PackedBatch
    from vtprune_train.data.load.collate import Collator
    from vtprune_train.training.checkpoint.folder import CheckpointFolder, TrainerState
    from vtprune_train.training.checkpoint.json_lines import JsonLines
    from vtprune_train.training.engine.engine import Engine
    from vtprune_train.training.faults.watchdog import Watchdog
    from vtprune_train.training.loop.trackers import Trackers


class Trainer(Protocol):
    """The part of the trainer that callbacks may use.

    Attributes:
        config: the run's settings; ``config.run_dir`` is its folder.
        engine: ``engine.module`` is the model.
        collate: makes batches of training samples; ``collate.index`` describes the samples.
        eval_collate: the same for ``data.eval``; ``None`` without evaluation data.
        device: this rank's device.
        state: ``state.step`` is the number of completed steps.
        total_steps: number of steps of the whole run.
        end_step: step at which this process stops.
        stop_code: exit code of the signal that ended training; 0 if there was none.
        samples: indices of the last step's samples, over all ranks.
        batches: this rank's micro-batches of the last step.
        row_losses: for each of ``batches``, the loss of every supervised token, [num_targets].
        trackers: TensorBoard, Weights & Biases or others; ``trackers.log({name: number}, step)``.
    """

    config: Config
    engine: Engine
    collate: Collator
    eval_collate: Collator | None
    checkpoints: CheckpointFolder
    device: torch.device
    state: TrainerState
    watchdog: Watchdog
    total_steps: int
    end_step: int
    stop_code: int
    samples: Sequence[int]
    batches: Sequence[PackedBatch]
    row_losses: list[torch.Tensor]
    trackers: Trackers

    def call(self, hook: str, *arguments: Any) -> None:
        """Call a hook of every callback, in order."""


class Callback:
    """Hooks of the training loop; a subclass overrides those it needs.

    Every rank calls every hook at the same step and in the same order, so hooks may use collectives
    (``torch.distributed``). The exception is :meth:`on_error`. Shipped callbacks run before those of the ``callbacks``
    setting, which run in the order in which they are listed. An exception in a hook ends the run with an error that
    names the callback and the hook.
    """

    @property
    def name(self) -> str:
        """Name in errors and checkpoints: ``file.py:Class`` or ``package.module:Class``."""
        return path_of(type(self))

    def on_start(self, trainer: Trainer) -> None:
        """Called before the first step of this process, after :meth:`load_state_dict`."""

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Called after every step, with its line of ``metrics.jsonl``."""

    def on_skip(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Called before :meth:`on_step` after a step that did not update the model; ``metrics["skipped"]`` says why."""

    def on_evaluate(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Called after every evaluation, with its line of ``eval.jsonl``."""

    def on_save(self, trainer: Trainer) -> None:
        """Called after every checkpoint. It is complete on disk only with ``train.save_in_background: false``;
        otherwise its files are still being written."""

    def on_error(self, trainer: Trainer, error: Exception) -> None:
        """Called when training fails, on the rank that raised ``error``. Other ranks may be waiting, so collectives
        would hang. An exception raised here is logged, and training ends with ``error``."""

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        """Called after the last step of this process and its checkpoint; ``finished`` if training is complete, not
        stopped by a signal or ``run.stop_after``."""

    def state_dict(self) -> dict[str, Any]:
        """State to resume from: numbers, strings, lists and dictionaries with string keys. Every checkpoint stores that
        of rank 0, unless it is empty."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned. Called on every rank of a resumed run, before :meth:`on_start`,
        but not if the state was empty."""

    def files(self) -> list[JsonLines]:
        """JSON Lines files that the callback writes; every checkpoint contains a copy of them."""
        return []
