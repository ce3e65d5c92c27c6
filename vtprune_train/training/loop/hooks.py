"""Calls the hooks of all callbacks and keeps their states."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vtprune_train.training import distributed as ranks
from vtprune_train.training.loop.callback import Callback, Trainer

log = logging.getLogger(__name__)


class Hooks:
    """The callbacks of a trainer, in order. The key of a callback is its name, with a number from the second one of
    that name on: ``file.py:Class``, ``file.py:Class (2)``."""

    def __init__(self, callbacks: Sequence[Callback]):
        names = [callback.name for callback in callbacks]
        counts = [names[:position].count(name) for position, name in enumerate(names)]
        keys = [f"{name} ({count + 1})" if count else name for name, count in zip(names, counts, strict=True)]
        self._callbacks = dict(zip(keys, callbacks, strict=True))
        self._noted: Exception | None = None  # the last error that names its callback

    def call(self, hook: str, *arguments: Any) -> None:
        """Call a hook of each callback. An exception gets a note that names the callback and the hook."""
        for key, callback in self._callbacks.items():
            with self._naming(key, hook):
                getattr(callback, hook)(*arguments)

    def call_on_error(self, trainer: Trainer, error: Exception) -> None:
        """Call ``on_error`` of each callback; an exception is logged, so that ``error`` ends training."""
        for key, callback in self._callbacks.items():
            try:
                callback.on_error(trainer, error)
            except Exception as failure:
                failure.__suppress_context__ = True  # ``error`` is reported separately
                log.exception("callback %s failed in on_error", key)

    def state_dict(self) -> dict[str, Any]:
        """The states that are not empty.

        Raises:
            TypeError: a state has values that JSON would change or cannot hold.
        """
        states = {}
        for key, callback in self._callbacks.items():
            with self._naming(key, "state_dict"):
                state = callback.state_dict()
                _check_json(state, f"state of callback {key}")
                states[key] = json.loads(json.dumps(state))
        return {key: state for key, state in states.items() if state}

    def check_states(self, states: dict[str, Any]) -> None:
        """Check that :meth:`load_state_dict` can find the callback of each state.

        Raises:
            ValueError: a state belongs to a class that the run has, but not to exactly one of its callbacks.
        """
        for key in states:
            self._target(key, states)

    def load_state_dict(self, states: dict[str, Any]) -> None:
        """Give each callback its state; those of callbacks that the run no longer has are dropped with a warning."""
        for key, state in states.items():
            target = self._target(key, states)
            if target is not None:
                with self._naming(target, "load_state_dict"):
                    self._callbacks[target].load_state_dict(state)
            elif ranks.rank() == 0:
                log.warning("the checkpoint has a state of callback %s, which this run does not have: it is lost", key)

    def _target(self, key: str, states: dict[str, Any]) -> str | None:
        """Key of the callback that gets the state ``key``: the same key or, because a file may move, the same class and
        number. ``None`` if the run no longer has the callback."""
        if key in self._callbacks:
            return key
        free = [other for other in self._callbacks if other not in states and _class(other) == _class(key)]
        rivals = [other for other in states if other not in self._callbacks and _class(other) == _class(key)]
        same = [other for other in free if _number(other) == _number(key)]
        if len(same) == 1 and [other for other in rivals if _number(other) == _number(key)] == [key]:
            return same[0]
        if free or _name(key) in self._callbacks:
            raise ValueError(
                f"the checkpoint has a state of callback {key}, and this run has {_class(key)} too, but it is unclear "
                "which of them gets the state; list the same callbacks in the same order as before, or start a new run "
                "from the weights with train.init_from"
            )
        return None

    @contextmanager
    def _naming(self, key: str, hook: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if error is not self._noted:  # otherwise a hook called within this one has added its note
                error.add_note(f"raised by callback {key} in {hook}")
            self._noted = error
            raise


def _name(key: str) -> str:
    return re.sub(r" \(\d+\)$", "", key)


def _number(key: str) -> str:
    return key.removeprefix(_name(key))


def _class(key: str) -> str:
    return _name(key).rpartition(":")[2]


def _check_json(value: Any, place: str) -> None:
    """Raise a ``TypeError`` if ``value`` does not survive a round trip through JSON."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{place}: the key {key!r} is not a string, and JSON would make it one; use str(key)")
            _check_json(item, f"{place}, key {key!r}")
    elif isinstance(value, list):
        for item in value:
            _check_json(item, place)
    elif not (value is None or isinstance(value, str | int | float)):
        raise TypeError(
            f"{place}: {value!r} is a {type(value).__name__}, which JSON cannot restore; use numbers, strings, lists "
            "and dictionaries"
        )
