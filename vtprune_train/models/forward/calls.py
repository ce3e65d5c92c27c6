"""What ``prune`` keeps beside a model, and what its decoder has to know of the forward pass in progress."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vtprune_train.core.stream import SegmentLayout, StreamPlan
from vtprune_train.models import HFModule
from vtprune_train.models.copies import Source
from vtprune_train.models.families.base import Family
from vtprune_train.models.families.layout import Grids
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import EncoderSignals

log = logging.getLogger(__name__)

STATE = "_vtprune"
# Ids of the states of models that run densely in this thread or asyncio task.
_DENSE: ContextVar[frozenset[int]] = ContextVar("vtprune_dense", default=frozenset())


@dataclass
class Call:
    """One forward pass in progress: what the decoder must know beside embeddings.

    Args:
        input_ids: [B, L] int64; ``None`` where the decoder is called alone, with text only.
        labels: [B, L] int64, as the caller gave them; ``None`` without a loss.
        prompt_width: columns of the prompt inside ``generate``, cached ones included; what follows does not rank.
        image_lengths: tokens of each image, in placeholder order; found while the family's own code runs.
        image_grids: the rasters of each, as far as the family knows them; empty where it knows none.
        positions: [3, B, L], counting each row of this call from 0, where the family has three parts and knows them.
        encoder: what the vision tower thought of the visual tokens; found likewise, where the method asks.
        segments, kept_rows, plan: the rows' layouts; for each boundary, the rows of the packed stream that entered the
            next stage; and the stages that were run. Left by the decoder.
    """

    input_ids: Tensor | None
    labels: Tensor | None = None
    prompt_width: int | None = None
    image_lengths: list[int] = field(default_factory=list)
    image_grids: list[Grids] = field(default_factory=list)
    positions: Tensor | None = None
    segments: list[SegmentLayout] = field(default_factory=list)
    encoder: EncoderSignals | None = None
    kept_rows: tuple[Tensor, ...] = ()
    plan: StreamPlan | None = None


class _InProgress(threading.local):
    """What runs right now, in each thread for itself. ``is_step``: whether the next forward pass is one that
    ``generate`` has prepared (any other inside it is a processor's or a criterion's, about something else); ``None``
    while it has prepared none, as loops of one's own may never do."""

    call: Call | None = None
    prompt_width: int | None = None
    is_step: bool | None = None

    def open(self, input_ids: Tensor, labels: Tensor | None) -> Call:
        """Note that a forward pass begins."""
        self.call = Call(input_ids, labels, None if self.is_step is False else self.prompt_width)
        self.is_step = False if self.is_step else self.is_step
        return self.call


@dataclass
class State:
    """What ``prune`` keeps beside a model: its choice, and what it replaced."""

    family: Family
    method: PruningMethod | None
    backend: str
    image_token: int
    attention: str = ""
    tower_backend: str = ""
    pruning: Any = None
    source: Source | None = None
    warned: set[str] = field(default_factory=set)
    running: _InProgress = field(default_factory=_InProgress)

    @property
    def is_dense(self) -> bool:
        """Whether the model runs as the dense one in this thread or asyncio task."""
        return id(self) in _DENSE.get()

    @contextmanager
    def densely(self) -> Iterator[None]:
        """Let the model run as the dense one, in this thread or asyncio task."""
        token = _DENSE.set(_DENSE.get() | {id(self)})
        try:
            yield
        finally:
            _DENSE.reset(token)

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        return dataclasses.replace(self, warned=set(), running=_InProgress())

    def __reduce__(self) -> Any:
        raise pickle.PicklingError(
            "a pruned model cannot be pickled: use save_pretrained, which keeps the settings, or unprune(model) first"
        )

    def warn_once(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            log.warning(message)

    @contextmanager
    def calling(self, input_ids: Tensor | None, labels: Tensor | None = None) -> Iterator[Call | None]:
        """Open a call around a forward pass of the whole model (or of its base, when that is called alone)."""
        if self.running.call is not None or input_ids is None:
            yield self.running.call
            return
        try:
            yield self.running.open(input_ids, labels)
        finally:
            self.running.call = None


def state_of(model: HFModule) -> State:
    """The state of a pruned model."""
    return model.__dict__[STATE]


def is_pruned(model: HFModule) -> bool:
    """Whether :func:`prune` changed this model, and neither :func:`unprune` nor :func:`dense` undoes it here."""
    inner = unwrapped(model)
    return STATE in inner.__dict__ and not state_of(inner).is_dense


def unwrapped(model: HFModule) -> HFModule:
    """The Hugging Face model inside a PEFT model or ``torch.compile``; any other model as it is."""
    model = model.__dict__.get("_modules", {}).get("_orig_mod", model)
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def by_name(original: Callable[..., Any], args: tuple[Any, ...], inputs: dict[str, Any]) -> dict[str, Any]:
    """All inputs as keywords."""
    if not args:
        return inputs
    names = [name for name in inspect.signature(original).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **inputs}
