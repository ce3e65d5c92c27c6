"""Human-readable descriptions of a method on a decoder of a given depth, for logs, the dry run and the method list."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from vtprune_train.core.stream import Drop
from vtprune_train.pruning.base import PruningMethod

MOST = 10  # maximum number of drops shown on one line


def title(method: PruningMethod) -> str:
    """The names of a method's parts, for example ``visionzip + plphp``."""
    return " + ".join(part.name for part in method.parts)


def in_words(settings: Mapping[str, Any]) -> str:
    """A method's settings on one line, for example ``fastv keep=0.5 layer=2``."""
    name = settings["method"]
    if not isinstance(name, str):
        name = " + ".join(str(part["method"]) for part in name)
    values = (f"{key}={value}" for key, value in settings.items() if key != "method" and value is not None)
    return " ".join([name, *values])


def schedule(method: PruningMethod, num_layers: int) -> str:
    """Describe where a method drops tokens in a decoder with ``num_layers`` layers and how many it keeps, with defaults
    resolved.

    Raises:
        ValueError: a setting does not fit the decoder.
    """
    drops, key_layers = method.drops(num_layers), method.key_layers(num_layers)
    words = [_drops(drops, num_layers)] if drops else []
    if key_layers:
        words.append(f"keys are dropped in layers {_ranges(key_layers)} of {num_layers}")
    counted = "keys that later rows see" if key_layers else "tokens that enter"
    words.append(f"mean over layers of the {counted} {method.input_share(num_layers):.3f}")
    return f"{title(method)}: {'; '.join(words)}"


def _drops(drops: Sequence[Drop], num_layers: int) -> str:
    about = "about " if any(drop.adaptive for drop in drops) else ""
    keeps = _listed(map(_kept, drops))
    layers = _listed(str(drop.layer) for drop in drops)
    return f"before layer{'s' if len(drops) > 1 else ''} {layers} of {num_layers} it keeps {about}{keeps}"


def _kept(drop: Drop) -> str:
    if drop.returns:
        return "all (they return)"
    if drop.adds:
        return "all (and adds learned tokens)"
    return f"{drop.keep:.3g}"


def _listed(words: Iterable[str]) -> str:
    """List all items if there are few, otherwise only the first and last."""
    several = list(words)
    if len(several) > MOST:
        several = [*several[: MOST - 2], "...", several[-1]]
    return ", ".join(several)


def _ranges(layers: Sequence[int]) -> str:
    """Format ``2, 3, 4, 7`` as ``2-4, 7``."""
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
