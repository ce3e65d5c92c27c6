"""State that ``prune`` attaches to a model, and per-call state that the decoder needs during a forward pass."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vtprune_train.core.stream import SegmentLayout, StreamPlan
from vtprune_train.models import HFModule
from vtprune_train.models.copies import Source
from vtprune_train.models.families.base import Family
from vtprune_train.models.families.layout import Grids
from vtprune_train.models.forward.shared_prefill import SharedPrefill
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import EncoderSignals, Selection

log = logging.getLogger(__name__)

STATE = "_vtprune"
# Ids of the states of models with pruning disabled in this thread or asyncio task.
_DENSE: ContextVar[frozenset[int]] = ContextVar("vtprune_dense", default=frozenset())


class Visual(NamedTuple):
    """The visual tokens of one image or video: their number, grids, steps in time and tiles (see
    :class:`~vtprune_train.core.stream.ImageSpan`). ``tile_tokens`` is only known if the method reads the tower."""

    length: int
    grids: Grids = ()
    frames: int = 0
    tile_tokens: tuple[int, ...] = ()


@dataclass
class Call:
    """State of one forward pass in progress that the decoder needs in addition to the embeddings.

    Args:
        input_ids: [B, L] int64; ``None`` if the decoder is called directly, with text only.
        labels: [B, L] int64, as passed by the caller; ``None`` if no loss is computed.
        prompt_width: prompt length in columns inside ``generate``, including cached columns; later columns are never
            query rows.
        images: the images in placeholder order; recorded while the family's code runs.
        videos: the videos, likewise.
        positions: [3, B, L] M-RoPE position ids, starting at 0 in each row of this call, if the family computes them.
        encoder: vision-tower signals of the visual tokens; recorded if the method needs them.
        host_labels: [B, L] int64, ``labels`` without those of visual tokens, on the host; recorded by the decoder.
        supervised: [R] int64, indices into the flattened rows of those whose next token is supervised; likewise.
        whole_head: the head is sharded on its own, so only its own output can be used in the loss.
        selects: run up to the last drop point only, to fill ``selections``; for the reference of another model.
        selections: the selection at each drop point: an input of the decoder (``None``: the method selects), or its
            output if ``selects``.
        segments, kept_rows, plan: outputs of the decoder: the layout of each row, the rows kept at each drop point, and
            the executed plan.
    """

    input_ids: Tensor | None
    labels: Tensor | None = None
    prompt_width: int | None = None
    images: list[Visual] = field(default_factory=list)
    videos: list[Visual] = field(default_factory=list)
    positions: Tensor | None = None
    segments: list[SegmentLayout] = field(default_factory=list)
    encoder: EncoderSignals | None = None
    host_labels: np.ndarray | None = None
    supervised: Tensor | None = None
    whole_head: bool = False
    selects: bool = False
    selections: tuple[Selection, ...] | None = None
    kept_rows: tuple[Tensor, ...] = ()
    plan: StreamPlan | None = None


class _InProgress(threading.local):
    """Thread-local state of running calls. ``is_step``: whether the next forward pass was prepared by ``generate``
    (others inside generate come from logits processors or stopping criteria); ``None`` until ``generate`` prepares one,
    so always ``None`` in custom loops. ``shared``: equal prompts whose prefill is still to run; ``repeats``: during
    that prefill, the prompt of each row of ``generate``. ``pixels``: for a reference model that is still to choose, the
    inputs of the vision tower, which ``generate`` does not pass on; ``selections``: what it chose for the prefill that
    is still to run; ``tower``: how the vision tower's tokens change in the run in progress; ``packed``: whether the
    images of a packed batch are encoded, which reads the tower itself."""

    call: Call | None = None
    prompt_width: int | None = None
    is_step: bool | None = None
    shared: SharedPrefill | None = None
    repeats: Tensor | None = None
    pixels: dict[str, Any] | None = None
    selections: tuple[Selection, ...] | None = None
    tower: Any = None
    packed: bool = False

    def open(self, input_ids: Tensor, labels: Tensor | None) -> Call:
        """Record the start of a forward pass."""
        self.call = Call(input_ids, labels, None if self.is_step is False else self.prompt_width)
        self.is_step = False if self.is_step else self.is_step
        return self.call


class RankBy:
    """The argument ``rank_by`` of :func:`vtprune_train.prune`: a reference model, or ``None`` for the first one that is
    loaded from the policy's path, which calls :meth:`loaded`."""

    def __init__(self, given: HFModule | None):
        self.given = given
        self.copy: Callable[[], HFModule | None] = lambda: None

    def loaded(self, model: HFModule) -> None:
        if self.copy() is None:  # later ones are for other purposes, such as evaluation
            self.copy = weakref.ref(model)

    def model(self) -> HFModule | None:
        return self.copy() if self.given is None else self.given


@dataclass
class State:
    """State that ``prune`` attaches to a model: the method and the attributes it replaced. ``chosen_for``: the device
    type and dtype that the backends were chosen for; ``None`` if the caller chose. ``tokenizer`` reads the question for
    methods that need it; ``None``: the one in the folder that the model was loaded from."""

    family: Family
    method: PruningMethod | None
    backend: str
    image_token: int
    video_token: int | None = None
    attention: str = ""
    tower_backend: str = ""
    chosen_for: tuple[str, torch.dtype] | None = None
    pruning: Any = None
    source: Source | None = None
    rank_by: RankBy | None = None
    tokenizer: Any = None
    warned: set[str] = field(default_factory=set)
    running: _InProgress = field(default_factory=_InProgress)

    def visual_tokens(self, input_ids: Tensor) -> Tensor:
        """[B, L] bool, whether each token of ``input_ids`` is a visual token."""
        images = input_ids == self.image_token
        return images if self.video_token is None else images | (input_ids == self.video_token)

    @property
    def is_dense(self) -> bool:
        """Whether pruning is currently disabled (``dense``) in this thread or asyncio task."""
        return id(self) in _DENSE.get()

    @contextmanager
    def densely(self) -> Iterator[None]:
        """Context manager that disables pruning in this thread or asyncio task."""
        token = _DENSE.set(_DENSE.get() | {id(self)})
        try:
            yield
        finally:
            _DENSE.reset(token)

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        return dataclasses.replace(self, rank_by=None, warned=set(), running=_InProgress())

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
        """Context manager around one forward pass of the model (or of its base model, if called directly)."""
        if self.running.call is not None or input_ids is None:
            yield self.running.call
            return
        try:
            yield self.running.open(input_ids, labels)
        finally:
            self.running.call = None

    @contextmanager
    def selecting(self, call: Call, prompt_width: int | None) -> Iterator[Call]:
        """Context manager around a pass of a reference model that selects tokens for the pass ``call`` of another
        model, or of the same model with other adapters."""
        before = self.running.call, self.running.prompt_width
        selects = Call(call.input_ids, call.labels, call.prompt_width, selects=True)
        self.running.call, self.running.prompt_width = selects, prompt_width
        try:
            yield selects
        finally:
            self.running.call, self.running.prompt_width = before


def state_of(model: HFModule) -> State:
    """The state of a pruned model."""
    return model.__dict__[STATE]


def is_pruned(model: HFModule) -> bool:
    """Whether the model is pruned, and pruning is not disabled here by :func:`dense`."""
    inner = unwrapped(model)
    return STATE in inner.__dict__ and not state_of(inner).is_dense


def unwrapped(model: HFModule) -> HFModule:
    """The Hugging Face model inside a PEFT model or ``torch.compile``; other models are returned unchanged."""
    model = model.__dict__.get("_modules", {}).get("_orig_mod", model)
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def by_name(original: Callable[..., Any], args: tuple[Any, ...], inputs: dict[str, Any]) -> dict[str, Any]:
    """Convert positional arguments to keyword arguments."""
    if not args:
        return inputs
    names = [name for name in inspect.signature(original).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **inputs}
