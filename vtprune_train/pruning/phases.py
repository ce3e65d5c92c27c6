"""Per-step pruning schedule of a training run: the configured method, a warm-up towards it, a budget drawn for each
step, a curriculum, or an occasional full-token step.

A step's phase follows from its number and the run's seed alone, so it is the same on every rank, at any world size,
and after a resume. Host only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from vtprune_train.core.stream import Drop
from vtprune_train.pruning.base import Per, PruningMethod

WarmupKind = Literal["dense", "linear", "cosine"]
# Separate the RNG streams of different draws for the same seed and step.
FULL_TOKENS = 0x66756C6C
BUDGET = 0x62756467
DRAWN = 200  # steps whose mean stands for a run's
TRIED = 16  # parts of a range of budgets between which the method is tried
ALMOST = 0.999  # stands for 1, where no method is needed
REMEMBERED = 64  # phases kept: the planner, the collator and the metrics ask for the same few steps
Range = tuple[float, float]


@dataclass(frozen=True)
class Warmup:
    """The first ``steps`` steps: ``dense`` keeps all tokens; ``linear`` and ``cosine`` anneal the keep ratios from
    ``start`` to the configured values."""

    steps: int
    kind: WarmupKind = "linear"
    start: float = 1.0

    def progress(self, step: int) -> float:
        """Warm-up progress at step ``step`` (counted from 0): 0 at ``start``, 1 at the configured ratios."""
        if step >= self.steps:
            return 1.0
        share = step / self.steps
        return share if self.kind == "linear" else (1 - math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class FullTokens:
    """Run a fraction ``share`` of the steps on all tokens. With ``weight`` their loss is cross-entropy + weight *
    KL(pruned || full) over the supervised rows, where the model's own pruned output is the teacher and gets no
    gradient; both are softened by ``temperature`` T, and the KL is multiplied by T * T.

    Source: DualSpeed (arXiv 2602.03815) and its code: share 0.1, weight 1, T 1.
    """

    share: float = 0.0
    weight: float = 0.0
    temperature: float = 1.0

    def chosen(self, seed: int, step: int) -> bool:
        return bool(np.random.default_rng([seed, step, FULL_TOKENS]).random() < self.share)


@dataclass(frozen=True)
class _Pass:
    """A forward pass; ``method`` ``None`` keeps all tokens."""

    method: PruningMethod | None

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        """Drop points and keep ratios of the pass."""
        return self.method.drops(num_layers) if self.method is not None else ()

    @property
    def per(self) -> Per:
        """What the keep ratios refer to in a video."""
        return "video" if self.method is None else self.method.per


@dataclass(frozen=True)
class Teacher(_Pass):
    """A forward pass without gradients over the same batch: its output is the target of weight * T^2 * KL(teacher ||
    model) over the supervised rows, where ``temperature`` T softens both outputs."""

    weight: float
    temperature: float


@dataclass(frozen=True)
class Phase(_Pass):
    """Pruning of one step: ``method`` is used in the trained pass, ``teacher`` (if any) has its own; ``full_tokens`` is
    true if this step was sampled as a full-token step."""

    teacher: Teacher | None = None
    full_tokens: bool = False


@dataclass(frozen=True)
class Budgets:
    """Draw a budget for each step, log-uniformly between ``low`` and ``high``, so that one model is accurate at all of
    them. A budget is the mean over layers of the share of visual tokens that enter a layer
    (:meth:`~vtprune_train.pruning.base.PruningMethod.input_share`). With ``weight``, a pass at a larger budget, drawn
    between the step's and ``high``, is the teacher.

    Args:
        low, high: smallest and largest budget, in (0, 1].
        num_layers: layers of the decoder.
        weight, temperature: of the KL divergence, see :class:`Teacher`.
    """

    low: float
    high: float
    num_layers: int
    weight: float = 0.0
    temperature: float = 1.0

    def fitted(self, method: PruningMethod) -> Budgets:
        """The part of the range that the method reaches in this decoder. In the first layers, PyramidDrop keeps all
        tokens, which is an eighth of the budget if the decoder has 8 layers.

        Raises:
            ValueError: the method reaches no budget of the range, or its learned parameters fit one budget only.
        """
        _check_parameters(method, "pruning.budgets")
        tried = [self.low * (self.high / self.low) ** (i / TRIED) for i in range(TRIED + 1)]
        reached = [share for share in tried if self._reached(share, method)]
        if not reached:
            self.at(min(self.high, ALMOST), method)  # raises
        low, high = reached[0], reached[-1]
        if low > self.low:
            low = math.ceil(1000 * self._border(low, self.low, method)) / 1000
        if high < self.high:
            high = math.floor(1000 * self._border(high, self.high, method)) / 1000
        return replace(self, low=low, high=high)

    def _border(self, inside: float, outside: float, method: PruningMethod) -> float:
        """The budget between one that is reached and one that is not, to 0.0005."""
        while abs(inside - outside) > 0.0005:
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if self._reached(middle, method) else (inside, middle)
        return inside

    def _reached(self, share: float, method: PruningMethod) -> bool:
        try:
            self.at(min(share, ALMOST), method)
        except ValueError:
            return False
        return True

    def ends(self, method: PruningMethod) -> list[PruningMethod | None]:
        """The method at the smallest and at the largest budget."""
        return [self.at(self.low, method), self.at(self.high, method)]

    def at(self, share: float, method: PruningMethod) -> PruningMethod | None:
        """The method at a budget; ``None`` for all tokens."""
        return None if share >= 1 else method.for_budget(share, self.num_layers)

    def drawn(self, seed: int, step: int) -> float:
        """The budget of a step."""
        return self._draws(seed, step)[0]

    def phase(self, method: PruningMethod, seed: int, step: int) -> Phase:
        share, more = self._draws(seed, step)
        student = self.at(share, method)
        if not self.weight:
            return Phase(student)
        return Phase(student, Teacher(self.at(more, method), self.weight, self.temperature))

    def describe(self) -> str:
        return f"a budget of {self.low:g} to {self.high:g} at each step"

    def _draws(self, seed: int, step: int) -> tuple[float, float]:
        """The budgets of a step and of its teacher."""
        first, second = np.random.default_rng([seed, step, BUDGET]).random(2)
        share = self.low * (self.high / self.low) ** first
        return float(share), float(share * (self.high / share) ** second)


@dataclass(frozen=True)
class Curriculum:
    """Draw the keep ratio of each step uniformly from a range that moves linearly from ``start`` at the first step to
    ``end`` after the last one; a pass that keeps more is the teacher. Drop points may move from ``layer`` to the
    method's own in the same way. For methods with one keep ratio.

    The teacher keeps ``gap[0]`` more than the model at the first step. This difference grows by ``growth`` over the
    whole run, but not beyond ``gap[1]``.

    Source: EPIC (arXiv 2510.00515). The defaults are those of its code for token consistency distillation
    (ZichenWen1/EPIC @ b2ed9cd). Moving the layer (layer consistency distillation) is described in the paper, but not
    part of its code; the teacher drops before the same layer as the model here.

    Args:
        start, end: lowest and highest keep ratio.
        total_steps: steps of the run.
        num_layers: layers of the decoder.
        gap, growth: how much more the teacher keeps.
        layer: drop point at the first step; ``None`` leaves the drop point where it is.
        weight, temperature: of the KL divergence, see :class:`Teacher`; without ``weight`` there is no teacher.
    """

    start: Range
    end: Range
    total_steps: int
    num_layers: int
    gap: Range = (0.1, 0.3)
    growth: float = 0.5
    layer: int | None = None
    weight: float = 0.0
    temperature: float = 1.0

    def fitted(self, method: PruningMethod) -> Curriculum:
        """Check that the method has one keep ratio, which it can have at every step, and, to move it, one drop point.

        Raises:
            ValueError: it does not; the message suggests methods.
        """
        _check_parameters(method, "pruning.curriculum")
        if not isinstance(getattr(method, "keep", None), float) or len(method.ratios) != 1:
            raise ValueError(
                f"pruning.curriculum moves the setting keep, one number, which {method.name} does not have; use "
                "pruning.budgets, or a method such as fastv, dart or random"
            )
        try:
            first, last = ([drop.layer for drop in one.drops(self.num_layers)] for one in self.ends(method))
        except ValueError as error:
            raise ValueError(f"pruning.curriculum: {error}") from error
        moves = len(first) == len(last) == 1 and (first != last or self.layer == _layer_of(method, self.num_layers))
        if self.layer is not None and not moves:
            raise ValueError(
                f"pruning.curriculum.layer={self.layer}: {method.name} has no setting layer that moves its only drop "
                "point; leave it out, or use a method such as fastv or dart"
            )
        return self

    def ends(self, method: PruningMethod) -> list[PruningMethod]:
        """The method at the first step with the most tokens, and after the last step with the fewest."""
        if self.layer is not None and not hasattr(method, "layer"):
            raise ValueError(f"{method.name} has no setting layer to move (layer={self.layer}); leave it out")
        return [self.at(self.start[1], 0.0, method), self.at(self.end[0], 1.0, method)]

    def keep_range(self, progress: float) -> Range:
        """Lowest and highest keep ratio at ``progress`` in [0, 1]."""
        low, high = (first + (last - first) * progress for first, last in zip(self.start, self.end, strict=True))
        return low, high

    def more(self, progress: float) -> float:
        """By how much the teacher's keep ratio is larger."""
        return min(self.gap[0] + self.growth * progress, self.gap[1])

    def at(self, keep: float, progress: float, method: PruningMethod) -> PruningMethod:
        """The method with a keep ratio and with the drop point of ``progress``."""
        method = method.with_ratios([keep])
        if self.layer is None:
            return method
        last = _layer_of(method, self.num_layers)
        moved: dict[str, Any] = {"layer": round(self.layer + (last - self.layer) * progress)}
        return replace(method, **moved)

    def drawn(self, seed: int, step: int) -> float:
        """The keep ratio of a step."""
        return float(np.random.default_rng([seed, step, BUDGET]).uniform(*self.keep_range(self._progress(step))))

    def phase(self, method: PruningMethod, seed: int, step: int) -> Phase:
        progress, keep = self._progress(step), self.drawn(seed, step)
        student = self.at(keep, progress, method)
        if not self.weight:
            return Phase(student)
        more = keep + self.more(progress)
        taught_by = self.at(more, progress, method) if more < 1 else None
        return Phase(student, Teacher(taught_by, self.weight, self.temperature))

    def describe(self) -> str:
        def words(ends: Range) -> str:
            return f"{ends[0]:g}" if ends[0] == ends[1] else f"{ends[0]:g} to {ends[1]:g}"

        layer = "" if self.layer is None else f", and the drop point from layer {self.layer}"
        return f"a curriculum from keep {words(self.start)} at the first step to {words(self.end)}{layer}"

    def _progress(self, step: int) -> float:
        return min(1.0, step / self.total_steps)


def _check_parameters(method: PruningMethod, place: str) -> None:
    if fixed := [part.name for part in method.parts if part.one_budget]:
        raise ValueError(
            f"{place}: the learned parameters of {fixed[0]} fit one budget only; use another method, for example "
            "pyramiddrop or divprune"
        )


def _layer_of(method: PruningMethod, num_layers: int) -> int:
    """The setting ``layer`` of a method, or the layer that its default means in this decoder."""
    layer: int | None = getattr(method, "layer", None)
    if layer is not None:
        return layer
    return method.drops(num_layers)[0].layer - (method.drops_after or 0)


@dataclass(frozen=True)
class Phases:
    """The phase of every step of a run.

    Args:
        method: the configured method; ``None`` never drops tokens.
        seed: the run's seed.
        warmup: warm-up schedule; ``None`` disables it.
        full: schedule of full-token steps.
        varied: what the other steps keep, if it changes from step to step; ``None``: what the method keeps.

    Raises:
        ValueError: the method does not have what ``varied`` changes.
    """

    method: PruningMethod | None
    seed: int = 0
    warmup: Warmup | None = None
    full: FullTokens = FullTokens()
    varied: Budgets | Curriculum | None = None
    _phases: dict[int, Phase] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.varied is not None and self.method is not None:
            object.__setattr__(self, "varied", self.varied.fitted(self.method))

    def of(self, step: int) -> Phase:
        """The phase of global step ``step``, counted from 0."""
        phase = self._phases.get(step)
        if phase is None:
            if len(self._phases) >= REMEMBERED:
                self._phases.clear()
            phase = self._phases[step] = self._of(step)
        return phase

    def _of(self, step: int) -> Phase:
        method = self.method
        if method is None:
            return Phase(None)
        if self.warmup is not None and step < self.warmup.steps:
            if self.warmup.kind == "dense":
                return Phase(None)
            method = method.eased(self.warmup.start, self.warmup.progress(step))
        if not self.full.chosen(self.seed, step):
            return Phase(method) if self.varied is None else self.varied.phase(method, self.seed, step)
        if self.varied is not None:
            return Phase(None, full_tokens=True)  # nothing keeps more, so nothing teaches
        teacher = Teacher(method, self.full.weight, self.full.temperature) if self.full.weight else None
        return Phase(None, teacher, full_tokens=True)

    @property
    def vary(self) -> bool:
        """Return whether any step uses something other than ``method``."""
        changes = self.warmup is not None or self.varied is not None or self.full.share > 0
        return self.method is not None and changes

    def ends(self) -> list[PruningMethod | None]:
        """The method as configured, and with the most and the fewest tokens that steps draw."""
        drawn = [] if self.varied is None or self.method is None else self.varied.ends(self.method)
        return [self.method, *drawn]

    def densest(self, first: int, end: int) -> int:
        """The step in [first, end) that keeps the most tokens: a full-token step if there is one; otherwise the first
        one (in a warm-up, later steps drop more), or the one that draws the most."""
        steps, varied = range(first, end), self.varied
        dense = 0 if self.warmup is None or self.warmup.kind != "dense" else self.warmup.steps
        full = next((step for step in steps if step >= dense and self.full.chosen(self.seed, step)), None)
        if full is not None:
            return full
        return first if varied is None else max(steps, key=lambda step: varied.drawn(self.seed, step), default=first)

    def keep(self, step: int, num_layers: int) -> list[float]:
        """Keep ratio of each stage after the first at ``step``; all 1.0 if nothing is dropped."""
        if self.method is None:
            return []
        drops = self.of(step).drops(num_layers)
        return [drop.keep for drop in drops] or [1.0] * len(self.method.drops(num_layers))

    def mean(self, cost: Callable[[Phase], float]) -> float:
        """Mean over the steps of a run, without its warm-up, of what ``cost`` returns for a phase. Steps on all tokens
        count with their share; drawn budgets and keep ratios with a sample of ``DRAWN`` steps."""
        usual = replace(self, warmup=None, full=FullTokens())
        if isinstance(usual.varied, Curriculum):
            usual = replace(usual, varied=replace(usual.varied, total_steps=DRAWN))
        steps = range(DRAWN if usual.varied is not None else 1)
        mean = float(np.mean([cost(usual.of(step)) for step in steps]))
        if not self.full.share:
            return mean
        full = replace(self, warmup=None, full=replace(self.full, share=1.0)).of(0)
        return (1 - self.full.share) * mean + self.full.share * cost(full)

    def state(self, step: int, num_layers: int) -> dict[str, Any]:
        """State of the schedule after ``step`` steps, as plain data for checkpoints; empty if the schedule never
        changes."""
        if not self.vary:
            return {}
        warmup = self.warmup
        return {
            "steps_done": step,
            "next_keep": self.keep(step, num_layers),
            "warmup": None
            if warmup is None
            else {"kind": warmup.kind, "start": warmup.start, "steps": warmup.steps, "done": step >= warmup.steps},
            "full_token_share": self.full.share,
            "consistency_weight": self.full.weight,
            "consistency_temperature": self.full.temperature,
            **({} if self.varied is None else {"varied": asdict(self.varied)}),
        }

    def describe(self) -> str:
        """One-line description for logs and the dry run."""
        parts = []
        if self.warmup is not None:
            how = "all tokens" if self.warmup.kind == "dense" else f"{self.warmup.kind} from {self.warmup.start:g}"
            parts.append(f"warm-up over {self.warmup.steps} steps ({how})")
        if self.full.share:
            loss = f"KL weight {self.full.weight:g}" if self.full.weight else "no consistency loss"
            parts.append(f"{self.full.share:.3g} of the steps on full tokens ({loss})")
        if self.varied is not None:
            loss = f"KL weight {self.varied.weight:g} to a pass that keeps more" if self.varied.weight else "no teacher"
            parts.append(f"{self.varied.describe()} ({loss})")
        return ", ".join(parts) or "the same schedule at every step"
