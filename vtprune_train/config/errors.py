"""Errors in settings, and suggestions for misspelled names."""

from __future__ import annotations

import difflib
import heapq
import os
from collections.abc import Iterable, Sequence
from typing import Any

COMPARED_NAMES = 500


class ConfigError(ValueError):
    """Settings are wrong; the message has one line for each error."""


def refusal(what: str, error: Exception) -> str:
    """The message for an error that a user can fix, or for a guard that stops a run, without a traceback."""
    return "\n".join([f"{what}:", *(f"  {line}" for line in str(error).splitlines())])


def pruning_refusal(error: Exception) -> str:
    """Prefix a pruning method's error with its key: ``setting=value ...`` becomes ``pruning.setting=value ...``."""
    return f"pruning.{error}" if str(error).partition("=")[0].isidentifier() else f"pruning: {error}"


def nearest_name(name: str, names: Iterable[str], cutoff: float) -> str | None:
    """The closest match of ``name`` in ``names``, by :mod:`difflib`. Of very many names, only those with the most
    similar beginning and end are compared."""

    def shared_ends(other: str) -> int:
        pairs = ((name, other), (name[::-1], other[::-1]))
        return sum(len(os.path.commonprefix(pair)) for pair in pairs)  # noqa: RUF071 (these are names, not paths)

    candidates = list(names)
    if len(candidates) > COMPARED_NAMES:
        candidates = heapq.nlargest(COMPARED_NAMES, candidates, key=shared_ends)
    return next(iter(difflib.get_close_matches(name, candidates, n=1, cutoff=cutoff)), None)


def did_you_mean(word: str, known: Sequence[str], parents: Sequence[Any] = ()) -> str:
    """Suffix of an error about an unknown name: suggests the closest of ``known``, or lists them all."""
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    prefix = "".join(f"{part}." for part in parents)
    return f"; did you mean {prefix}{nearest[0]}?" if nearest else f"; known: {', '.join(known)}"
