"""The pruning-method interface: where a method drops tokens, how it scores them, how many it keeps, and what happens to
the others.

A method is a frozen dataclass whose fields are its settings and whose methods are pure functions on tensors; it keeps
no state between forward passes and never accesses the model. The decoder loop
(:mod:`vtprune_train.models.forward.decoder`) calls it at every drop point. Tokens that are not kept can be:

- dropped: absent from the :class:`Selection`;
- merged: :attr:`Selection.values` replaces tokens of the next stage with averages of dropped tokens, or with learned
  tokens;
- set aside: they skip some layers, and a later :class:`~vtprune_train.core.stream.Drop` with ``returns`` restores them
  all;
- dropped from the KV cache of a head: :meth:`PruningMethod.keys` returns which keys later rows can attend to in a
  layer.

Shape suffixes: T tokens in the stream, V candidates (visual tokens before a boundary), K tokens after it, Q query rows,
H query heads, G key-value heads, D head size, C hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from vtprune_train.core.flops import TowerGeometry
from vtprune_train.core.plan import plan_stream
from vtprune_train.core.stream import Boundary, Drop, SegmentLayout, StreamPlan
from vtprune_train.core.user_code import path_of
from vtprune_train.pruning.candidates import Candidates, Ranking, Selection
from vtprune_train.pruning.needs import Needs
from vtprune_train.pruning.ops.selection import top_k_per_span
from vtprune_train.pruning.schedules.budget import mean_input_share, scaled_to_budget
from vtprune_train.pruning.setting_types import Settings

PACKAGE = "vtprune_train.pruning."
Per = Literal["video", "frame"]
"""What the keep ratios refer to in a video: ``video`` keeps a share of all its tokens, ``frame`` the same share of each
step in time. Images are not affected."""
_PER = (
    "what the keep ratios refer to in a video: `video` keeps a share of all its tokens, `frame` the same share of each "
    "step in time; images are not affected"
)


def method_name(cls: type[PruningMethod]) -> str:
    """Return how settings refer to a method's class: by name if it is part of the package, otherwise by path."""
    return cls.name if cls.__module__.startswith(PACKAGE) else path_of(cls)


class PruningMethod(Settings):
    """Base class of methods that drop visual tokens.

    The annotated attributes of a subclass are its settings: a frozen dataclass, validated by pydantic, without a
    decorator. A subclass defines at least :meth:`drops` or :meth:`key_layers`, and :meth:`score`, :meth:`choose` or
    :meth:`keys`; :attr:`needs` says what the loop must prepare for it.

    Args:
        per: whether keep ratios refer to all tokens of a ``video`` or to those of each ``frame`` (step in time). Images
            are not affected. Keyword only.

    Attributes:
        name: the method's name in logs and errors; by default the name of the class. Methods of the package also have
            this name in YAML, on the command line and in ``config.json``.
        paper: title and arXiv number.
        where: where the method acts, as shown by ``vtprune methods``, for example ``before the decoder``, ``between
            layers``, ``key-value cache`` or ``vision tower``.
        trains: whether the method can be trained and how, or why not; also shown by ``vtprune methods``.
        drops_after: difference between the layer before which a drop point acts and its entry in the setting ``layers``
            or ``layer``: 0 if tokens are dropped before the layer that is set, 1 if after it. Default drop points are
            moved with it in decoders in which only some layers attend; ``None`` if they cannot be moved one by one.
        one_budget: whether the shapes of its learned parameters depend on the budget, so that a trained model works at
            one budget only.
        before: settings added after a release, with the values that reproduce the method's earlier behavior; they apply
            to checkpoints that lack these settings.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    where: ClassVar[str] = "between layers"
    trains: ClassVar[str] = "yes"
    drops_after: ClassVar[int | None] = 0
    one_budget: ClassVar[bool] = False
    before: ClassVar[Mapping[str, Any]] = {}

    per: Per = dataclasses.field(default="video", kw_only=True, metadata={"description": _PER})

    def __init_subclass__(cls, **options: Any) -> None:
        if "name" not in vars(cls):
            cls.name = cls.__name__
        _refuse_bare_needs(cls)
        super().__init_subclass__(**options)

    @property
    def needs(self) -> Needs:
        """What the decoder loop prepares for the method; the default is :class:`Needs` without arguments."""
        return Needs()

    @property
    def parts(self) -> tuple[PruningMethod, ...]:
        """The individual methods that :attr:`~vtprune_train.core.stream.Drop.owner` refers to; a combination has
        several."""
        return (self,)

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        """Return the drop points for a decoder with ``num_layers`` layers and the keep ratio at each, in ascending
        layer order.

        Raises:
            ValueError: a setting is invalid for this decoder; the message names the setting, its value and how to fix
                it.
        """
        return ()

    def key_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers in which :meth:`keys` drops keys.

        Raises:
            ValueError: a setting does not fit the decoder.
        """
        return ()

    def score(self, candidates: Candidates) -> Tensor:
        """Return [V] float32 scores, one per candidate; the highest are kept. Runs without gradients."""
        raise NotImplementedError(f"{self.name} must implement score or choose")

    def choose(self, candidates: Candidates) -> Selection:
        """Select the candidates that enter the next stage. Does no device-to-host copy unless the drop is adaptive.

        Runs with gradients, which :attr:`Selection.values` may carry; an override should score under
        ``torch.no_grad()``. The default keeps the planned number of tokens with the highest :meth:`score`, in their
        original order.

        Raises:
            ValueError: :meth:`score` did not return one number per candidate.
        """
        boundary = candidates.boundary
        with torch.no_grad():
            scores = self.score(candidates)
        expected = boundary.span_of_visual.shape
        if not isinstance(scores, Tensor) or scores.shape != expected:
            result = f"a tensor {list(scores.shape)}" if isinstance(scores, Tensor) else repr(scores)
            raise ValueError(
                f"{method_name(type(self))}: score(candidates) returned {result}; return a tensor {list(expected)}, "
                f"one number for each of the {len(boundary.span_of_visual)} candidates"
            )
        return Selection(top_k_per_span(scores, boundary.span_of_visual, boundary.take))

    def keys(self, layer: int, ranking: Ranking, boundary: Boundary) -> Tensor:
        """Return a [G, V] bool mask of the visual keys in decoder layer ``layer`` that stay visible to later rows and
        stay in the cache.

        Every head of a layer must keep the same number of keys per span so that the layer's cache stays rectangular.
        Runs without gradients. ``ranking`` comes from this layer; ``boundary`` describes the stage the layer belongs to
        (no tokens are dropped there).
        """
        raise NotImplementedError(f"{self.name} does not implement keys")

    def module(self, hidden: int, num_layers: int) -> nn.Module | None:
        """Return the module with the method's learned parameters, or ``None``. It is trained, saved and loaded with the
        model.

        Parameters keep the module's own initialization, except embeddings, which use the decoder's initializer.
        Call submodules instead of reading their parameters (ZeRO-3 gathers a parameter only inside its module's
        ``forward``), and call them equally often on every rank, with or without images: an empty result must also be
        passed to :attr:`Selection.values`. ``forward`` must accept [n, hidden] for any n and its output must depend on
        every parameter; it is called with n = 0 on steps that drop nothing.
        """
        return None

    def tower_module(self, tower: TowerGeometry) -> nn.Module | None:
        """Like :meth:`module`, for parameters used inside a vision tower of these sizes (:attr:`Needs.tower`);
        ``forward`` takes [n, any width] and is only called with n = 0, on steps that do not change the tower's
        tokens."""
        return None

    def plan(self, segments: Sequence[SegmentLayout], num_layers: int) -> StreamPlan:
        """Plan the stages of a micro-batch (runs on the host only)."""
        key_layers = self.key_layers(num_layers)
        return plan_stream(segments, self.drops(num_layers), num_layers, key_layers=key_layers, method=self)

    def input_share(self, num_layers: int) -> float:
        """Mean over layers of the fraction of visual tokens entering a layer; this is the quantity a budget refers to.
        For a method that only drops keys, the fraction of keys visible to later rows is used instead."""
        return mean_input_share(self.drops(num_layers), num_layers)

    def kept_key_share(self, layer: int, length: float, num_layers: int) -> float:
        """Planned fraction of an image's keys that layer ``layer`` (one of :meth:`key_layers`) keeps.

        Args:
            layer: decoder layer, counted from 0.
            length: mean number of image tokens in that layer.
            num_layers: number of decoder layers.
        """
        chosen = len(self.key_layers(num_layers))
        share = (self.input_share(num_layers) * num_layers - (num_layers - chosen)) / chosen
        return min(1.0, max(0.0, share))

    def for_budget(self, share: float, num_layers: int) -> PruningMethod:
        """Return a copy of the method tuned so that :meth:`input_share` equals ``share``. The default implementation
        scales ``keep``.

        Raises:
            ValueError: the method cannot reach ``share`` with this many layers; the message gives the reachable range.
        """
        return scaled_to_budget(self, share, num_layers)

    def selector_flops(self, hidden: int, boundary: Boundary) -> float:
        """FLOPs of scoring and selection at a drop point, excluding the ranking's projections and attention rows."""
        return 0.0

    @property
    def ratios(self) -> tuple[float, ...]:
        """The keep ratios that a warm-up anneals; empty if the method has none."""
        keep = getattr(self, "keep", None)
        return keep if isinstance(keep, tuple) else () if keep is None else (keep,)

    def with_ratios(self, ratios: Sequence[float]) -> Self:
        """Return a copy of the method with these keep ratios."""
        changes: dict[str, Any] = {
            "keep": tuple(ratios) if isinstance(getattr(self, "keep", None), tuple) else ratios[0]
        }
        return replace(self, **changes)

    def eased(self, start: float, progress: float) -> PruningMethod:
        """Return the method with its keep ratios interpolated from ``start`` at every drop point (``progress`` 0) to
        their configured values (1).

        Raises:
            ValueError: the method has no keep ratios to anneal.
        """
        if not self.ratios:
            raise ValueError(f"{self.name} has no keep ratios to anneal; use pruning.warmup.kind=dense")
        return self.with_ratios([start + (ratio - start) * progress for ratio in self.ratios])

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain data, in the form stored in ``config.json`` and in YAML. ``per`` is left out if
        it has its default."""
        values = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}
        if self.per == "video":
            del values["per"]
        return {"method": method_name(type(self)), **values}


def _refuse_bare_needs(cls: type[PruningMethod]) -> None:
    """Reject a class that sets an attribute of :class:`Needs` directly, where the loop does not read it.

    Raises:
        ValueError: says what to write instead.
    """
    if "needs" in vars(cls):
        return
    inherited = {name for base in cls.__mro__[1:] for name in getattr(base, "__dataclass_fields__", ())}
    stated = {*vars(cls), *vars(cls).get("__annotations__", ())} - inherited
    if names := [field.name for field in dataclasses.fields(Needs) if field.name in stated]:
        arguments = ", ".join(f"{name}=self.{name}" for name in names)
        first = cls.needs is PruningMethod.needs
        source = "Needs from vtprune_train" if first else "replace from dataclasses"
        value = f"Needs({arguments})" if first else f"replace(super().needs, {arguments})"
        raise ValueError(
            f"{cls.__name__}.{names[0]} has no effect: the loop reads the property needs. Import {source} and add to "
            f"the class:\n\n    @property\n    def needs(self):\n        return {value}\n"
        )
