"""The plan of a trial: settings and faults, drawn from the trial's seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

STEPS = 12
SAVED_STEPS = 4  # maximum steps of a start before another fault
EVAL_EVERY = 3

# Moments are those of tests/faults/inject.py.
START = ("in_tokenizer", "in_piece", "assembling", "writing_index", "selecting", "loading", "after_loading")
IN_STEP = (
    "before_forward", "in_backward", "before_optimizer", "after_optimizer", "before_metrics", "after_metrics",
    "in_evaluation", "after_evaluation",
)  # fmt: skip
IN_SAVE = (
    "before_weights", "in_shard", "before_export", "after_export", "before_manifest", "before_rename", "before_latest",
    "while_deleting",
)  # fmt: skip
END = ("before_last_save", "drawing")
INDEXING = ("in_piece", "assembling", "writing_index", "selecting")
EVALUATING = ("in_evaluation", "after_evaluation")
OF_RANK_0 = (*IN_SAVE[2:], "drawing")  # other ranks do not reach it
OF_EITHER = ("in_tokenizer", *INDEXING)  # the first rank that reaches it

KILLS = ("kill", "kill_group", "kill_launcher", "kill_worker")
STOPS = ("sigterm", "sigterm_all", "sigint", "sigint_all", "stop_after")
FULL_DISKS = (
    "in_tokenizer", "writing_index", "selecting", "before_metrics", "in_evaluation", "before_weights", "in_shard",
    "before_export", "after_export", "before_manifest", "before_latest", "drawing",
)  # fmt: skip

HOWS = ("truncate", "flip", "zero_tail", "zero_body", "remove", "garbage")
LINES = (*HOWS, "lose_middle_lines", "lose_last_lines")
DAMAGED = {
    "checkpoint": HOWS,
    "manifest": HOWS,
    "latest": HOWS,
    "metrics.jsonl": LINES,
    "eval.jsonl": LINES,
    "index column": HOWS,
    "index manifest": HOWS,
    "index piece": HOWS,
    "selection": HOWS,
    "tokenizer": HOWS,
    "run.lock": HOWS,
    "config.yaml": HOWS,
    "leftover": (".partial", ".deleting"),
}


@dataclass(frozen=True)
class Settings:
    ranks: int
    zero: int
    background: bool
    workers: int
    evaluate: bool
    save_every: int

    def overrides(self) -> list[str]:
        evaluation = [f"train.eval_every={EVAL_EVERY}"] if self.evaluate else ["data.eval=[]"]
        return [
            f"deepspeed=configs/deepspeed/zero{self.zero}.json",
            f"train.save_in_background={str(self.background).lower()}",
            f"data.workers={self.workers}",
            f"train.save_every={self.save_every}",
            f"train.max_steps={STEPS}",
            f"train.epochs={STEPS}",
            *evaluation,
        ]


@dataclass(frozen=True)
class Fault:
    """One fault. ``what`` happens at ``moment`` (for damage: the kind of file) on ``rank``, at the earliest ``offset``
    steps after the newest checkpoint. ``pick`` in [0, 1) selects a file and a position in it; ``real`` requests a disk
    that is really full."""

    kind: str  # kill, stop, disk, damage
    what: str
    moment: str
    rank: str = "0"
    offset: int = 1
    pick: float = 0.0
    real: bool = False

    def __str__(self) -> str:
        if self.kind == "damage":
            return f"{self.what} {self.moment}"
        return f"{self.what}{' (real)' if self.real else ''} at {self.moment}"


@dataclass(frozen=True)
class Trial:
    number: int
    settings: Settings
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Choices:
    """The choices that trials are drawn from."""

    seed: int = 0
    ranks: Sequence[int] = (1, 2)
    zero: Sequence[int] = (0, 2, 3)
    background: Sequence[bool] = (True, False)
    kinds: Sequence[str] = ("kill", "stop", "disk", "damage")


def draw(choices: Choices, number: int) -> Trial:
    """Trial ``number``; equal for equal choices, independent of other trials."""
    rng = random.Random(f"{choices.seed}-{number}")
    settings = Settings(
        ranks=rng.choice(choices.ranks),
        zero=rng.choice(choices.zero),
        background=rng.choice(choices.background),
        workers=rng.choice((0, 1, 1)),
        evaluate=rng.random() < 0.6,
        save_every=rng.choice((1, 2)),
    )
    count = rng.choices((1, 2, 3), weights=(5, 4, 2))[0]
    faults = [draw_fault(rng, choices.kinds, settings, last=position == count - 1) for position in range(count)]
    return Trial(number, settings, tuple(faults))


def draw_fault(rng: random.Random, kinds: Sequence[str], settings: Settings, last: bool) -> Fault:
    kind = rng.choice(kinds)
    if kind == "damage":
        targets = [name for name in DAMAGED if settings.evaluate or name != "eval.jsonl"]
        target = rng.choice(targets)
        return Fault(kind, rng.choice(DAMAGED[target]), target, pick=rng.random())
    what = {
        "kill": rng.choice([act for act in KILLS if possible(act, settings)]),
        "stop": rng.choice(STOPS),
        "disk": "fill",
    }[kind]
    if what == "stop_after":
        return Fault(kind, what, "a step", offset=rng.randint(1, 3))
    moments = {"fill": FULL_DISKS, "kill_worker": IN_STEP}.get(what, (*START, *IN_STEP, *IN_SAVE, *END))
    moment = rng.choice([name for name in moments if fits(name, settings, last)])
    rank = str(rng.randrange(settings.ranks))
    if moment in OF_RANK_0:
        rank = "0"
    elif moment in OF_EITHER:
        rank = "any"
    return Fault(kind, what, moment, rank, offset=rng.randint(1, 3), real=kind == "disk" and rng.random() < 0.5)


def possible(act: str, settings: Settings) -> bool:
    return {"kill_launcher": settings.ranks > 1, "kill_worker": settings.workers > 0}.get(act, True)


def fits(moment: str, settings: Settings, last: bool) -> bool:
    return (last or moment not in END) and (settings.evaluate or moment not in EVALUATING)
