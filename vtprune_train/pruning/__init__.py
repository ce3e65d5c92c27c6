"""The methods, one file each, and their registry."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.pyramiddrop import PyramidDrop

METHODS: dict[str, type[PruningMethod]] = {PyramidDrop.name: PyramidDrop}


def method_from_settings(settings: Mapping[str, Any]) -> PruningMethod | None:
    """Build a method from plain data (YAML, a checkpoint's ``config.json``); ``method: none`` gives ``None``.

    Raises:
        ValueError: unknown method or setting, naming what is known.
    """
    if not isinstance(settings, Mapping):
        raise ValueError(f"pruning settings {settings!r} are no mapping; write for example {{'method': 'pyramiddrop'}}")
    name = settings.get("method")
    if name in (None, "none"):
        return None
    if name not in METHODS:
        raise ValueError(f"method={name!r} is unknown; known methods: {', '.join(METHODS)}, none")
    cls = METHODS[name]
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {key: value for key, value in settings.items() if key != "method"}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{unknown[0]!r} is not a setting of {name}; it has: {', '.join(sorted(known))}")
    return cls(**values)


__all__ = ["METHODS", "PruningMethod", "PyramidDrop", "method_from_settings"]
