"""Models that a tool opens by a pruned model's path: TRL's reference models.

A trainer that needs a reference opens ``model.config._name_or_path`` again, and ``from_pretrained`` gives a dense
model. While a model is pruned, the string there is an object of its own. A model opened by that object is pruned alike;
one opened by any other string, equal or not, is what ``from_pretrained`` gives.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

from vtprune_train.models import HFModule

log = logging.getLogger(__name__)

_OPENERS = "_vtprune_from_pretrained"  # on a class: its own from_pretrained was replaced
_LOCK = threading.RLock()  # models are opened in several threads


class Source:
    """A pruned model's path: the config's ``_name_or_path``. ``prune`` prunes a model that was opened from it."""

    known: ClassVar[weakref.WeakSet[Source]] = weakref.WeakSet()

    def __init__(self, name: str, prune: Callable[[HFModule], HFModule]):
        before = self.of(name)
        self.original: str = name if before is None else before.original
        self.name = "".join(list(name))  # an equal string that is another object
        self.prune = prune
        if self.name is not self.original:  # Python has one object for each string of a single character
            with _LOCK:
                self.known.add(self)

    @classmethod
    def of(cls, name: Any) -> Source | None:
        """Whose very string ``name`` is."""
        with _LOCK:
            return next((source for source in cls.known if source.name is name), None)


def follow(model_class: type[HFModule]) -> None:
    """Let ``model_class.from_pretrained`` prune what is opened by the string of a :class:`Source`."""
    with _LOCK:
        if _OPENERS in model_class.__dict__:
            return
        opened = model_class.from_pretrained.__func__

        @functools.wraps(opened)
        def from_pretrained(cls: type[HFModule], pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
            source = Source.of(pretrained_model_name_or_path)
            made = opened(cls, pretrained_model_name_or_path, *args, **kwargs)
            if source is not None:
                source.prune(made[0] if isinstance(made, tuple) else made)  # a tuple with output_loading_info
                log.info("%s was opened by a pruned model's path and is pruned alike", pretrained_model_name_or_path)
            return made

        model_class.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment]
        setattr(model_class, _OPENERS, True)
