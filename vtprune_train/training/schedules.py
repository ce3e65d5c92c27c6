"""Learning-rate schedules: a factor of all learning rates that depends only on the number of updates."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from vtprune_train.config.errors import ConfigError
from vtprune_train.config.train import TrainConfig
from vtprune_train.core import user_code
from vtprune_train.core.rounding import ceil_of

Schedule = Callable[[int, int, int], float]


def load_schedule(train: TrainConfig) -> Schedule:
    """Return the function ``(update, total_updates, warmup_updates) -> factor`` of ``train.schedule``. Updates count
    from 0, and the factor multiplies the base learning rates.

    ``train.schedule`` names one of

    - ``cosine``, ``linear``: linear warm-up from 0, then decay to ``train.min_rate`` at ``total_updates`` (the
      conventions of transformers' schedulers);
    - ``constant``: linear warm-up, then 1;
    - ``wsd`` (warmup-stable-decay, arXiv 2404.06395): linear warm-up, then 1, and over the last ``train.decay_ratio``
      of the updates linear decay to ``train.min_rate``;
    - the path of such a function, which also defines the warm-up. It is imported here, once.

    Raises:
        ConfigError: the function cannot be imported. The returned function raises it for a factor that is not a finite
            number of at least 0.
    """
    if not user_code.is_path(train.schedule):
        return partial(_factor, train)
    try:
        function = user_code.load(train.schedule, "train.schedule")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not callable(function):
        raise ConfigError(f"train.schedule={train.schedule}: {function!r} is not a function")
    return partial(_checked_factor, train.schedule, function)


def check_schedule(train: TrainConfig) -> None:
    """Raise a ``ConfigError`` if ``train.schedule`` is the path of an unusable function; tries 100 updates."""
    schedule = load_schedule(train)
    for update in range(100):
        schedule(update, 100, 3)


def _factor(train: TrainConfig, update: int, total_updates: int, warmup_updates: int) -> float:
    if update < warmup_updates:
        return update / max(1, warmup_updates)
    if train.schedule == "constant":
        return 1.0
    first = warmup_updates  # of the decay
    if train.schedule == "wsd":
        first = max(warmup_updates, total_updates - ceil_of(train.decay_ratio, total_updates))
    progress = max(0, update - first) / max(1, total_updates - first)
    if train.schedule == "cosine":
        share = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    else:
        share = max(0.0, 1.0 - progress)
    return train.min_rate + (1.0 - train.min_rate) * share


def _checked_factor(
    path: str, function: Callable[..., object], update: int, total_updates: int, warmup_updates: int
) -> float:
    factor = function(update, total_updates, warmup_updates)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < math.inf:
        raise ConfigError(
            f"train.schedule={path} returned {factor!r} for update {update} of {total_updates}; it must return a "
            "finite number of at least 0"
        )
    return float(factor)
