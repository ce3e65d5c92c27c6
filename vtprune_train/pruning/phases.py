"""Per-step pruning schedule of a training run: the configured method, a warm-up towards it, or an occasional full-token
step.

A step's phase follows from its number and the run's seed alone, so it is the same on every rank, at any world size,
and after a resume. Host only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vtprune_train.core.stream import Drop
from vtprune_train.pruning.base import Per, PruningMethod

WarmupKind = Literal["dense", "linear", "cosine"]
FULL_TOKENS = 0x66756C6C  # separates the RNG stream for full-token steps from others with the same seed and step


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
class Teacher:
    """The pruned forward pass that is the teacher of a full-token step."""

    method: PruningMethod
    weight: float
    temperature: float


@dataclass(frozen=True)
class Phase:
    """Pruning of one step: ``method`` is used in the trained pass (``None``: keep all tokens), ``teacher`` in the
    teacher pass; ``full_tokens`` is true if this step was sampled as a full-token step."""

    method: PruningMethod | None
    teacher: Teacher | None = None
    full_tokens: bool = False

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        """Drop points and keep ratios of the trained pass."""
        return self.method.drops(num_layers) if self.method is not None else ()

    @property
    def per(self) -> Per:
        """What the keep ratios refer to in a video, in the trained pass."""
        return "video" if self.method is None else self.method.per


@dataclass(frozen=True)
class Phases:
    """The phase of every step of a run.

    Args:
        method: the configured method; ``None`` never drops tokens.
        seed: the run's seed.
        warmup: warm-up schedule; ``None`` disables it.
        full: schedule of full-token steps.
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
        """Return whether any step uses something other than ``method``."""
        return self.method is not None and (self.warmup is not None or self.full.share > 0)

    def keep(self, step: int, num_layers: int) -> list[float]:
        """Keep ratio of each stage after the first at ``step``; all 1.0 if nothing is dropped."""
        if self.method is None:
            return []
        drops = self.of(step).drops(num_layers)
        return [drop.keep for drop in drops] or [1.0] * len(self.method.drops(num_layers))

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
        return ", ".join(parts) or "the same schedule at every step"
