"""Prunes models that a tool reloads from a pruned model's path, such as TRL reference models.

A trainer that needs a reference model reloads ``model.config._name_or_path``, and ``from_pretrained`` returns a dense
model. While a model is pruned, this attribute is a ``str`` subclass (Source). Loading a model through that object
prunes it in the same way; loading with any ordinary string, even an equal one, is unaffected.
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

_OPENERS = "_vtprune_from_pretrained"  # class attribute: marks that from_pretrained was patched
_LOCK = threading.RLock()  # models may be loaded from several threads


class Source:
    """Marked ``_name_or_path`` of a pruned model; models loaded with it are pruned too."""

    known: ClassVar[weakref.WeakSet[Source]] = weakref.WeakSet()

    def __init__(self, name: str, prune: Callable[[HFModule], HFModule]):
        before = self.of(name)
        self.original: str = name if before is None else before.original
        self.name = "".join(list(name))  # an equal string that is another object
        self.prune = prune
        if self.name is not self.original:  # CPython interns single-character strings, so identity cannot be used
            with _LOCK:
                self.known.add(self)

    @classmethod
    def of(cls, name: Any) -> Source | None:
        """Return the Source whose string object is ``name`` (identity, not equality)."""
        with _LOCK:
            return next((source for source in cls.known if source.name is name), None)


def follow(model_class: type[HFModule]) -> None:
    """Make ``model_class.from_pretrained`` prune models that are loaded with the string of a :class:`Source`."""
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
                log.info(
                    "%s was loaded from a pruned model's path, so it is pruned in the same way",
                    pretrained_model_name_or_path,
                )
            return made

        model_class.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment]
        setattr(model_class, _OPENERS, True)
