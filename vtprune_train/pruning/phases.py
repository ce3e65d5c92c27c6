"""What each step of a training run drops: the method itself, a warm-up towards it, or nothing for once.

A step's phase follows from its number and the run's seed alone, so it is the same on every rank, at any world size,
and after a resume. Host only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vtprune_train.core.stream import Drop
from vtprune_train.pruning.base import PruningMethod

WarmupKind = Literal["dense", "linear", "cosine"]
FULL_TOKENS = 0x66756C6C  # sets the draw of full-token steps apart from other draws of the same seed and step


@dataclass(frozen=True)
class Warmup:
    """The first ``steps`` steps: ``dense`` keeps all tokens; ``linear`` and ``cosine`` take the keep ratios from
    ``start`` to the method's own."""

    steps: int
    kind: WarmupKind = "linear"
    start: float = 1.0

    def progress(self, step: int) -> float:
        """How far from ``start`` (0) to the method's ratios (1) step ``step`` is, counted from 0."""
        if step >= self.steps:
            return 1.0
        share = step / self.steps
        return share if self.kind == "linear" else (1 - math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class FullTokens:
    """A ``share`` of the steps runs on all tokens. With ``weight`` their loss is cross-entropy + weight * KL(pruned ||
    full) over the supervised rows, where the model's own pruned output is the teacher and gets no gradient; both are
    softened by ``temperature`` T, and the KL is multiplied by T * T.

    Source: DualSpeed (arXiv 2602.03815) and its code: share 0.1, weight 1, T 1.
    """

    share: float = 0.0
    weight: float = 0.0
    temperature: float = 1.0

    def chosen(self, seed: int, step: int) -> bool:
        return bool(np.random.default_rng([seed, step, FULL_TOKENS]).random() < self.share)


@dataclass(frozen=True)
class Teacher:
    """The pruned pass that a full-token step learns from."""

    method: PruningMethod
    weight: float
    temperature: float


@dataclass(frozen=True)
class Phase:
    """One step: ``method`` drops in the pass that is trained (``None``: all tokens stay), ``teacher`` in the one it is
    compared with; ``full_tokens`` if the step was drawn to run on all tokens."""

    method: PruningMethod | None
    teacher: Teacher | None = None
    full_tokens: bool = False

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        """Where and how much the trained pass drops."""
        return self.method.drops(num_layers) if self.method is not None else ()


@dataclass(frozen=True)
class Phases:
    """The phase of every step of a run.

    Args:
        method: what the run trains for; ``None`` drops nothing at any step.
        seed: the run's.
        warmup: the first steps; ``None`` starts with the method itself.
        full: which of the steps that drop run on all tokens instead.
    """

    method: PruningMethod | None
    seed: int = 0
    warmup: Warmup | None = None
    full: FullTokens = FullTokens()

    def of(self, step: int) -> Phase:
        """The phase of global step ``step``, counted from 0."""
        method = self.method
        if method is None:
            return Phase(None)
        if self.warmup is not None and step < self.warmup.steps:
            if self.warmup.kind == "dense":
                return Phase(None)
            method = method.eased(self.warmup.start, self.warmup.progress(step))
        if not self.full.chosen(self.seed, step):
            return Phase(method)
        teacher = Teacher(method, self.full.weight, self.full.temperature) if self.full.weight else None
        return Phase(None, teacher, full_tokens=True)

    @property
    def vary(self) -> bool:
        """Whether some step does anything but drop by ``method``."""
        return self.method is not None and (self.warmup is not None or self.full.share > 0)

    def keep(self, step: int, num_layers: int) -> list[float]:
        """The share of visual tokens in each stage after the first at ``step``: all ones where nothing is dropped."""
        if self.method is None:
            return []
        drops = self.of(step).drops(num_layers)
        return [drop.keep for drop in drops] or [1.0] * len(self.method.drops(num_layers))

    def state(self, step: int, num_layers: int) -> dict[str, Any]:
        """Where the schedule stands once ``step`` steps are done, as plain data for checkpoints; empty for a run of
        one schedule."""
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
        }

    def describe(self) -> str:
        """A line for logs and the dry run."""
        parts = []
        if self.warmup is not None:
            how = "all tokens" if self.warmup.kind == "dense" else f"{self.warmup.kind} from {self.warmup.start:g}"
            parts.append(f"warm-up over {self.warmup.steps} steps ({how})")
        if self.full.share:
            loss = f"KL weight {self.full.weight:g}" if self.full.weight else "no consistency loss"
            parts.append(f"{self.full.share:.3g} of the steps on full tokens ({loss})")
        return ", ".join(parts) or "one schedule from the first step"
