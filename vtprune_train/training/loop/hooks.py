"""Calls the hooks of all callbacks and keeps their states."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vtprune_train.training import distributed as ranks
from vtprune_train.training.loop.callback import Callback, Trainer

log = logging.getLogger(__name__)


class Hooks:
    """The callbacks of a trainer, in order."""

    def __init__(self, callbacks: Sequence[Callback]):
        names = [callback.name for callback in callbacks]
        counts = [names[:position].count(name) for position, name in enumerate(names)]
        keys = [f"{name} ({count + 1})" if count else name for name, count in zip(names, counts, strict=True)]
        self._callbacks = dict(zip(keys, callbacks, strict=True))

    def call(self, hook: str, *arguments: Any) -> None:
        """Call a hook of each callback. An exception gets a note that names the callback and the hook."""
        for key, callback in self._callbacks.items():
            with _naming(key, hook):
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
        """The states of all callbacks that have one."""
        states = {}
        for key, callback in self._callbacks.items():
            with _naming(key, "state_dict"):
                states[key] = _plain(callback.state_dict())
        return {key: state for key, state in states.items() if state}

    def load_state_dict(self, states: dict[str, Any]) -> None:
        """Give each callback its state; those of callbacks that the run no longer has are dropped with a warning."""
        for key, state in states.items():
            if key in self._callbacks:
                with _naming(key, "load_state_dict"):
                    self._callbacks[key].load_state_dict(state)
            elif ranks.rank() == 0:
                log.warning("the checkpoint has a state of callback %s, which this run does not have: it is lost", key)


@contextmanager
def _naming(key: str, hook: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not getattr(error, "__notes__", None):  # otherwise a hook called within this one has added its note
            error.add_note(f"raised by callback {key} in {hook}")
        raise


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(state))  # type: ignore[no-any-return]
    except (TypeError, ValueError) as error:
        raise TypeError(f"a state must be JSON-serializable: {error}") from error
