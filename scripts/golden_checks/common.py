"""Reads recorded cases from a folder, and reports the result of comparing with one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


class CaseError(ValueError):
    """Raised if a case cannot be read; names what is missing or unknown, and where."""


class Entries(dict[str, Any]):
    """An object in a case's JSON; a missing key raises :class:`CaseError`."""

    def __missing__(self, key: str) -> Any:
        raise CaseError(f"the JSON has no {key!r} beside {', '.join(self)}")


class Tensors(dict[str, Tensor]):
    """The tensors of a case; a missing name raises :class:`CaseError`."""

    def __missing__(self, key: str) -> Tensor:
        raise CaseError(f"the safetensors file has no tensor {key!r}")

    def below(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with ``prefix``, in float32, by their names without it.

        Raises:
            CaseError: there are none.
        """
        found = {key.removeprefix(prefix): value.float() for key, value in self.items() if key.startswith(prefix)}
        if not found:
            raise CaseError(f"the safetensors file has no tensor {prefix}*")
        return found


@dataclass(frozen=True)
class Case:
    """``NAME.json`` and ``NAME.safetensors``."""

    name: str
    entries: Entries
    tensors: Tensors


def read_case(folder: Path, name: str) -> Case:
    """Read one case.

    Raises:
        CaseError: one of its two files is missing or broken.
    """
    for suffix in ("json", "safetensors"):
        if not (folder / f"{name}.{suffix}").is_file():
            raise CaseError(f"{folder / name}.{suffix} is missing; a case is a pair NAME.json and NAME.safetensors")
    try:
        entries = json.loads((folder / f"{name}.json").read_text(), object_hook=Entries)
        tensors = Tensors(load_file(folder / f"{name}.safetensors"))
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise CaseError(str(error)) from error
    if not isinstance(entries, Entries):
        raise CaseError(f"the JSON holds {type(entries).__name__}, not an object")
    return Case(name, entries, tensors)


@dataclass(frozen=True)
class Part:
    """One comparison: ``problem`` describes the difference, or is ``None``; ``gap`` is the largest difference between
    numbers that may differ by rounding."""

    name: str
    problem: str | None = None
    gap: float | None = None


def compare(name: str, ours: Any, theirs: Any, tolerance: float | None = None) -> Part:
    """Compare two tensors (or numbers): all entries must be equal, or differ by at most ``tolerance``."""
    ours, theirs = torch.as_tensor(ours).detach(), torch.as_tensor(theirs)
    if ours.shape != theirs.shape:
        return Part(name, f"{name}: shape {list(ours.shape)} instead of {list(theirs.shape)}")
    if tolerance is None:
        wrong, gap = ours != theirs, None
    else:
        gaps = (ours.double() - theirs.double()).abs()
        wrong, gap = ~(gaps <= tolerance), gaps.max().item() if gaps.numel() else 0.0
    places = wrong.flatten().nonzero().flatten()
    if not len(places):
        return Part(name, None, gap)
    first = int(places[0])
    of_numbers = "" if gap is None else f" by up to {gap:.2e} (more than {tolerance:g})"
    return Part(
        name,
        f"{name}: {len(places)} of {ours.numel()} entries differ{of_numbers}, the first at {first}: "
        f"{ours.flatten()[first].item():.6g} instead of {theirs.flatten()[first].item():.6g}",
        gap,
    )


@dataclass(frozen=True)
class Outcome:
    """The result of a case.

    Args:
        name: of the case.
        parts: all comparisons.
        documented: a deviation that the method's page documents, and the parts that it affects; all other parts must be
            equal.
    """

    name: str
    parts: tuple[Part, ...]
    documented: str = ""
    excused: tuple[str, ...] = ()

    @property
    def differing(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.problem)

    @property
    def passed(self) -> bool:
        return all(self.documented and part.name in self.excused for part in self.differing)

    def __str__(self) -> str:
        problems = "; ".join(part.problem for part in self.differing if part.problem)
        if not self.passed:
            return f"FAIL    {self.name}: {problems}"
        if problems:
            return f"differs {self.name} (documented: {self.documented}): {problems}"
        exact = [part.name for part in self.parts if part.gap is None]
        shown = [f"{' and '.join(exact)} equal"] if exact else []
        shown += [f"{part.name} {part.gap:.1e}" for part in self.parts if part.gap is not None]
        note = " (though a deviation is documented)" if self.documented else ""
        return f"ok      {self.name}: {', '.join(shown)}{note}"
