"""Shares of integers without floating-point error: 0.7 of 90 is 63, although ``0.7 * 90`` is 62.99999999999999.

Each float is interpreted as the fraction that it approximates: 0.7 as 7/10, ``64 / 576`` as 1/9.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

DIGITS = 17  # enough digits to distinguish any two floats in [0.1, 1)
LARGEST = 2**31  # limit for tensor counts and denominators, so that their product fits in int64

Whole = TypeVar("Whole", int, Tensor)


@lru_cache(maxsize=1024)
def as_fraction(share: float) -> Fraction:
    """Return the fraction ``share`` approximates: the nearest fraction with the shortest denominator that converts back
    to the same float.

    Raises:
        ValueError: ``share`` is not finite.
    """
    if not math.isfinite(share):
        raise ValueError(f"{share} is not a finite number, so it cannot be a share")
    exact = Fraction(share)
    for digits in range(DIGITS + 1):
        nearest = exact.limit_denominator(10**digits)
        if float(nearest) == share:
            return nearest
    return exact


def floor_of(share: float | Fraction, count: Whole) -> Whole:
    """``floor(share * count)``.

    Args:
        share: see :func:`as_fraction`; for a tensor in [0, 1].
        count: an int, or an int64 tensor of any shape on any device with values in [0, 2**31] (no device-to-host copy).
    """
    fraction = _fraction(share)
    if isinstance(count, Tensor):
        below = _below(fraction)
        return torch.div(count * below.numerator, below.denominator, rounding_mode="floor")
    return fraction.numerator * count // fraction.denominator


def ceil_of(share: float | Fraction, count: int) -> int:
    """``ceil(share * count)``; see :func:`floor_of`."""
    return -floor_of(share, -count)


def round_of(share: float | Fraction, count: int) -> int:
    """``share * count`` rounded to the nearest integer, half to even; see :func:`floor_of`."""
    return round(_fraction(share) * count)


def _fraction(share: float | Fraction) -> Fraction:
    return as_fraction(share) if isinstance(share, float) else Fraction(share)


@lru_cache(maxsize=1024)
def _below(fraction: Fraction) -> Fraction:
    """Largest fraction <= ``fraction`` with a denominator <= :data:`LARGEST`; it gives the same floor for all counts up
    to :data:`LARGEST`."""
    nearest = fraction.limit_denominator(LARGEST)
    if nearest <= fraction:
        return nearest
    # The neighbour c / d below a / b among such fractions: a d - b c = 1, with the largest d.
    a, b = nearest.numerator, nearest.denominator
    d = pow(a, -1, b)
    d += (LARGEST - d) // b * b
    return Fraction((a * d - 1) // b, d)
