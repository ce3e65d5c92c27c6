"""Options that the commands share: which model, and how it drops."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Literal, TypeVar

from vtprune_train.inference.chatting import DTYPES, Loaded, load, model_config
from vtprune_train.models.build import resolve_checkpoint
from vtprune_train.models.patch import CONFIG_KEY, SAVED
from vtprune_train.pruning import METHODS, method_from_settings
from vtprune_train.pruning.base import PruningMethod

Number = TypeVar("Number", int, float)

SETTINGS = ("layers", "keep", "rank_with", "positions", "without_instruction")


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """``--model``."""
    help_text = "a run of this project, one of its checkpoints, a Hugging Face folder, or a hub id"
    parser.add_argument("--model", required=True, metavar="DIR", help=help_text)


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """``--method`` with its settings, and where the model runs."""
    dropping = parser.add_argument_group("dropping", "left out: the settings saved with the model")
    dropping.add_argument("--method", help=f"{', '.join(METHODS)}, or none for the dense model")
    dropping.add_argument("--layers", type=numbers(int, "8,16,24"), help="decoder layers to drop before: 8,16,24")
    dropping.add_argument("--keep", type=numbers(float, "0.5,0.25,0.125"), help="shares that stay: 0.5,0.25,0.125")
    dropping.add_argument("--rank_with", help="next_layer or this_layer")
    dropping.add_argument("--positions", help="renumber or keep")
    dropping.add_argument("--without_instruction", help="last_visual or uniform")
    place = parser.add_argument_group("where it runs")
    place.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is one")
    place.add_argument("--dtype", choices=[*DTYPES], default="auto", help="auto: as saved")


def numbers(kind: Callable[[str], Number], example: str) -> Callable[[str], list[Number]]:
    """An argument type: a list written with commas."""

    def parse(text: str) -> list[Number]:
        try:
            return [kind(part) for part in text.strip("[]").split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as {example}") from None

    return parse


def load_model(arguments: argparse.Namespace) -> Loaded:
    """The model that the options name.

    Raises:
        ValueError: see :func:`asked_method` and :func:`vtprune_train.inference.chatting.load`.
    """
    return load(arguments.model, asked_method(arguments), device=arguments.device, dtype=arguments.dtype)


def asked_method(arguments: argparse.Namespace) -> PruningMethod | Literal["saved"] | None:
    """The method that the options name; settings without ``--method`` change the model's saved ones.

    Raises:
        ValueError: unknown method or setting, or settings of no method.
    """
    given = {key: value for key in SETTINGS if (value := getattr(arguments, key)) is not None}
    if arguments.method is None and not given:
        return SAVED
    if arguments.method == "none" and given:
        raise ValueError(f"--{next(iter(given))} has no effect: --method is none; leave one of them out")
    if arguments.method is not None:
        return method_from_settings({"method": arguments.method, **given})
    saved = getattr(model_config(resolve_checkpoint(arguments.model)), CONFIG_KEY, None)
    if saved is None:
        raise ValueError(
            f"--{next(iter(given))} changes the saved settings, but {arguments.model} holds none; name the --method"
        )
    return method_from_settings({**saved, **given})
