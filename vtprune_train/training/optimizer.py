"""Parameter groups and schedule. The learning rate is a function of the number of updates alone."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import nn

from vtprune_train.models.io.build import parts_of
from vtprune_train.models.io.placement import whole_shape

Schedule = Literal["cosine", "linear", "constant"]


def parameter_groups(model: nn.Module, rates: dict[str, float], weight_decay: float) -> list[dict[str, Any]]:
    """Groups ``{params, lr, weight_decay, part}``: one for each trained part, and for the part's biases, norms and
    ``image_newline``, which do not decay."""
    groups = []
    for part, parameters in parts_of(model).items():
        if part not in rates:
            continue
        for decays in (True, False):
            chosen = [p for _, p in parameters if p.requires_grad and (len(whole_shape(p)) > 1) is decays]
            if chosen:
                decay = weight_decay if decays else 0.0
                groups.append({"params": chosen, "lr": rates[part], "weight_decay": decay, "part": part})
    return groups


def rate_factor(step: int, total_steps: int, warmup_steps: int, schedule: Schedule) -> float:
    """What multiplies every base learning rate of the update after ``step`` others.

    Linear warm-up from 0, then cosine or linear decay to 0 at ``total_steps``, or no decay (the conventions of
    transformers' schedulers).
    """
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return max(0.0, 1.0 - progress)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def set_rates(groups: list[dict[str, Any]], rates: dict[str, float], factor: float) -> dict[str, float]:
    """Set the learning rate of every group; returns them by part."""
    current = {part: rate * factor for part, rate in rates.items()}
    for group in groups:
        group["lr"] = current[group["part"]]
    return current
