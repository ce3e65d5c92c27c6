"""What a setting may be. Each raises a ``ValueError`` that names the setting, its value and the way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_choice(setting: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{setting}={value!r} is not one of {', '.join(allowed)}")


def check_share(setting: str, value: float) -> None:
    """A share of tokens that stay, in (0, 1]."""
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{setting}={value:g} is not in (0, 1]; it is the share of tokens that stay")


def check_whole(setting: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{setting}={value!r} is no whole number of {least} or more")


def check_layer(setting: str, layer: int, num_layers: int, least: int = 0) -> None:
    """A decoder layer, counted from 0, before which tokens change; ``least`` 1 where attention has to come first."""
    if not least <= layer < num_layers:
        raise ValueError(
            f"{setting}={layer} does not fit a decoder of {num_layers} layers (counted from 0); use a layer from "
            f"{least} to {num_layers - 1}"
        )
