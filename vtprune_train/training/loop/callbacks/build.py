"""The callbacks of a run and their order."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from vtprune_train.config.errors import ConfigError, did_you_mean
from vtprune_train.config.settings import Config
from vtprune_train.core.user_code import is_path, load_class
from vtprune_train.training.checkpoint.json_lines import JsonLines
from vtprune_train.training.loop.callback import Callback
from vtprune_train.training.loop.callbacks.evaluation import Evaluation
from vtprune_train.training.loop.callbacks.garbage_collection import GarbageCollection
from vtprune_train.training.loop.callbacks.metrics import LineFile, Metrics
from vtprune_train.training.loop.callbacks.plot import Plot
from vtprune_train.training.loop.callbacks.profiler import Profiler
from vtprune_train.training.loop.callbacks.progress import Progress
from vtprune_train.training.loop.callbacks.spikes import Spikes
from vtprune_train.training.loop.callbacks.tracking import Tracking
from vtprune_train.training.loop.callbacks.unreadable import Unreadable
from vtprune_train.training.loop.trackers import Trackers

# Those that `callbacks` can name, in the order in which they run.
OPTIONAL: dict[str, type[Callback]] = {"profiler": Profiler, "garbage_collection": GarbageCollection}


def build_callbacks(
    config: Config, trackers: Trackers, configured: Sequence[Callback], more: Sequence[Callback] = ()
) -> list[Callback]:
    """All callbacks of a run in order: those that every run has, ``more``, and ``configured`` (see
    :func:`callbacks_of`)."""
    run_dir, train = config.run_dir, config.train
    spikes = LineFile(JsonLines(run_dir / "spikes.jsonl"))
    if train.spike_threshold is not None:
        spikes = Spikes(run_dir, train.spike_threshold, train.spike_window)
    shipped: list[Callback] = [
        Unreadable(),
        Metrics(JsonLines(run_dir / "metrics.jsonl", every_step=True)),
        Evaluation(JsonLines(run_dir / "eval.jsonl")),
        Tracking(trackers),
        Plot(run_dir),
        spikes,
        Progress(),
    ]
    return [*shipped, *more, *configured]


def callbacks_of(config: Config) -> list[Callback]:
    """The callbacks of the ``callbacks`` setting: shipped ones first, then the others as listed.

    Raises:
        ConfigError: an entry does not name a callback, or its arguments are wrong; the message names the entry.
    """
    callbacks = [_make(entry, f"callbacks.{number}") for number, entry in enumerate(config.callbacks)]
    shipped = [callback for cls in OPTIONAL.values() for callback in callbacks if type(callback) is cls]
    return [*shipped, *(callback for callback in callbacks if callback not in shipped)]


def _check_hooks(cls: type[Callback], place: str) -> None:
    """Refuse a method that looks like a hook but is none: it would never be called."""
    hooks = [name for name in vars(Callback) if name.startswith("on_")]
    for name in dir(cls):
        if name.startswith("on_") and name not in hooks and callable(getattr(cls, name)):
            raise ConfigError(f"{place} defines {name}, which is not a hook{did_you_mean(name, hooks)}")


def _make(entry: str | dict[str, Any], key: str) -> Callback:
    arguments = {"class": entry} if isinstance(entry, str) else dict(entry)
    path = arguments.pop("class", None)
    if not isinstance(path, str):
        raise ConfigError(f"{key}={entry!r}: class is missing; write {{class: path/to/file.py:Class, argument: value}}")
    if is_path(path):
        try:
            cls = load_class(path, Callback, key)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    elif path in OPTIONAL:
        cls = OPTIONAL[path]
    else:
        hint = did_you_mean(path, [*OPTIONAL])
        raise ConfigError(f"{key}: {path!r} is not a callback{hint} (your own: path/to/file.py:Class)")
    _check_hooks(cls, f"{key}: {path}")
    known = [*inspect.signature(cls).parameters]
    accepts_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(cls).parameters.values())
    for name in arguments:
        if name not in known and not accepts_any:
            hint = did_you_mean(name, known) if known else "; it takes none"
            raise ConfigError(f"{key}: {path} has no argument {name!r}{hint}")
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {path} cannot be created: {error}") from error
