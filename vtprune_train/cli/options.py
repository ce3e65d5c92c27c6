"""Command-line options shared by the commands: the model and the pruning method."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from vtprune_train.config.include import read_pruning
from vtprune_train.config.pruning import TRAINING_ONLY
from vtprune_train.evaluation.answering import DTYPES, Loaded, load, model_config, recorded_chat, recorded_prompt
from vtprune_train.evaluation.questions import Question, read_questions
from vtprune_train.models.families import register_family
from vtprune_train.models.io import original
from vtprune_train.models.io.build import resolve_checkpoint
from vtprune_train.pruning import (
    NONE,
    SAVED,
    method_class,
    method_from_settings,
    saved_settings,
    setting_types,
    trust_saved,
)
from vtprune_train.pruning.base import PruningMethod

Number = TypeVar("Number", int, float)

SETTINGS = ("layers", "keep", "rank_with", "positions", "without_instruction")
METHOD_HELP = (
    "a name of `vtprune methods --names`, none for the dense model, path/to/file.py:Class, a list such as "
    "'[visionzip, plphp]', or a YAML file with a section pruning"
)


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``."""
    help_text = "a run, one of its checkpoints, a Hugging Face model folder, or a Hub id"
    parser.add_argument("--model", required=True, metavar="DIR", help=help_text)
    add_trust_option(parser)


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--family`` and ``--trust_remote_code``; :func:`load_user_code` acts on them."""
    help_text = "the model's family, if it is not in the package: path/to/file.py:FAMILY"
    parser.add_argument("--family", metavar="PATH", help=help_text)
    help_text = "run the code of a custom pruning method that the model's config.json names"
    parser.add_argument("--trust_remote_code", "--trust-remote-code", action="store_true", help=help_text)


def load_user_code(arguments: argparse.Namespace) -> None:
    """Before a command runs, import the family that ``--family`` names and, with ``--trust_remote_code``, the method
    that the model's ``config.json`` names."""
    if (family := getattr(arguments, "family", None)) is not None:
        register_family(family, "--family")
    if not getattr(arguments, "trust_remote_code", False):
        return
    if arguments.model is None:
        raise ValueError("--trust_remote_code has no effect without --model; leave it out")
    source = resolve_checkpoint(arguments.model)
    if original.read_config(Path(source)) is None and not Path(source).is_file():
        trust_saved(model_config(source))


def add_data_options(parser: argparse.ArgumentParser, data: str) -> None:
    """Add ``--data`` (with the help text ``data``), ``--images`` and ``--ignore``."""
    parser.add_argument("--data", required=True, metavar="FILE", help=data)
    parser.add_argument("--images", default=".", metavar="DIR", help="folder of the images that the data names")
    help_text = "fields of records to ignore"
    parser.add_argument("--ignore", nargs="+", default=[], metavar="FIELD", help=help_text)
    help_text = "class that reads the data file, for other kinds of files: path/to/file.py:Class"
    parser.add_argument("--reader", default="", metavar="PATH", help=help_text)


def asked_questions(arguments: argparse.Namespace, limit: int) -> tuple[list[Question], list[tuple[str, str]]]:
    """The questions of ``--data``, with the prompt texts of the run that trained the model, and ``(id, reason)`` of
    records of which something is left out."""
    data = Path(arguments.data)
    prompt = recorded_prompt(arguments.model, data)
    images, ignore = Path(arguments.images), arguments.ignore
    chat = recorded_chat(arguments.model)
    return read_questions(data, images, limit, arguments.seed, ignore, prompt, arguments.reader, chat)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--fps`` and ``--num_frames``."""
    help_text = "frames of a video to use for each second (default: the setting saved with the model)"
    parser.add_argument("--fps", type=float, metavar="X", help=help_text)
    help_text = "frames of a video to use in total, instead of --fps"
    parser.add_argument("--num_frames", type=int, metavar="N", help=help_text)


def check_least(arguments: argparse.Namespace, **least: int) -> None:
    """Raise ``ValueError`` if an option is below its minimum in ``least``."""
    for option, number in least.items():
        if getattr(arguments, option) < number:
            raise ValueError(f"--{option}={getattr(arguments, option)} is below {number}")


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--method`` with its settings, ``--device`` and ``--dtype``."""
    group = parser.add_argument_group("pruning", "default: the settings saved with the model")
    group.add_argument("--method", help=METHOD_HELP)
    add_set_option(group)
    group.add_argument(
        "--layers", type=numbers(int, "8,16,24"), help="drop before these decoder layers, for example 8,16,24"
    )
    group.add_argument("--keep", type=numbers(float, "0.5,0.25,0.125"), help="keep ratios, for example 0.5,0.25,0.125")
    group.add_argument("--rank_with", help="next_layer or this_layer")
    group.add_argument("--positions", help="renumber or keep")
    group.add_argument("--without_instruction", help="last_visual or uniform")
    budget = "fit the method to this mean share of visual tokens that enter a layer, in (0, 1]; 1: all tokens"
    group.add_argument("--budget", type=float, metavar="X", help=budget)
    add_place_options(parser)


def add_place_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--device`` and ``--dtype``."""
    place = parser.add_argument_group("where it runs")
    place.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if available")
    place.add_argument("--dtype", choices=[*DTYPES], default="auto", help="auto: the saved data type")


def add_set_option(parser: Any) -> None:
    """Add ``--set key=value``."""
    help_text = "any setting of the method, for example --set keep=0.25; can be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=help_text)


def numbers(kind: Callable[[str], Number], example: str) -> Callable[[str], list[Number]]:
    """An argument type for numbers separated by commas."""

    def parse(text: str) -> list[Number]:
        try:
            return [kind(part) for part in text.strip("[]").split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as {example}") from None

    return parse


def load_model(arguments: argparse.Namespace) -> Loaded:
    """Load the model that the options choose."""
    return load(
        arguments.model,
        asked_method(arguments),
        device=arguments.device,
        dtype=arguments.dtype,
        fps=getattr(arguments, "fps", None),
        num_frames=getattr(arguments, "num_frames", None),
    )


def asked_method(arguments: argparse.Namespace) -> PruningMethod | Literal["saved"] | None:
    """The method that the options choose, fitted to ``--budget``; settings without ``--method`` change the saved
    settings of the model.

    Raises:
        ValueError: an option is invalid or has no effect; the message names it.
    """
    budget = getattr(arguments, "budget", None)
    if budget is None:
        return _asked_method(arguments)
    if not 0 < budget <= 1:
        raise ValueError(f"--budget={budget:g} is not in (0, 1] (a share of the visual tokens)")
    method, config = _asked_method(arguments), model_config(resolve_checkpoint(arguments.model))
    if method == SAVED:
        saved = saved_settings(config)
        method = None if saved is None else method_from_settings(saved)
    if not isinstance(method, PruningMethod):
        raise ValueError(f"--budget={budget:g} has no effect without a method that drops tokens; set --method")
    if budget == 1:
        return None
    if fixed := [part.name for part in method.parts if part.one_budget]:
        raise ValueError(
            f"--budget={budget:g}: the learned parameters of {fixed[0]} fit the budget that the model was trained for"
        )
    try:
        return method.for_budget(budget, config.get_text_config().num_hidden_layers)
    except ValueError as error:
        raise ValueError(f"--budget={budget:g}: {error}") from error


def _asked_method(arguments: argparse.Namespace) -> PruningMethod | Literal["saved"] | None:
    options = {key: value for key in SETTINGS if (value := getattr(arguments, key)) is not None}
    written = [f"--{key}" for key in options] + [f"--set {pair}" for pair in arguments.set]
    options.update(set_values(arguments.set))
    named = None if arguments.method == SAVED else arguments.method
    if named is None and not options:
        return SAVED
    if named == NONE and options:
        raise ValueError(f"{written[0]} has no effect with --method none; remove one of them")
    if named is not None:
        return method_from_settings(changed(named_method(named), options))
    saved = saved_settings(model_config(resolve_checkpoint(arguments.model)))
    if saved is None:
        raise ValueError(f"{written[0]} changes saved settings, but {arguments.model} has none; set --method")
    return method_from_settings(changed(saved, options))


def set_values(pairs: list[str]) -> dict[str, Any]:
    """The settings of ``--set key=value``, values read as YAML."""
    values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {pair}: write key=value, for example --set keep=0.25")
        if key == "method":
            raise ValueError(f"--set {pair}: the method is not one of its settings; choose it with --method")
        try:
            values[key] = yaml.safe_load(text) if text else None
        except yaml.YAMLError as error:
            raise ValueError(f"--set {pair}: {text!r} is not YAML ({error})") from error
    return values


def named_method(name: str) -> dict[str, Any]:
    """The settings of ``--method``: a name, a list or a YAML file."""
    if name.endswith((".yaml", ".yml")):
        section = read_pruning(Path(name))
        return {key: value for key, value in section.items() if key not in TRAINING_ONLY}
    if not name.startswith("["):
        return {"method": name}
    try:
        return {"method": yaml.safe_load(name)}
    except yaml.YAMLError as error:
        raise ValueError(f"--method={name} is not YAML ({error})") from error


def changed(settings: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``settings`` updated from the command line. A single value such as ``--keep 0.25`` fits settings that take
    a number and those that take a list."""
    name = settings.get("method")
    if isinstance(name, str) and name != NONE and options:
        types = setting_types(method_class(name))
        options = {
            key: value[0] if isinstance(value, list) and len(value) == 1 and not takes_list(types.get(key)) else value
            for key, value in options.items()
        }
    return {**settings, **options}


def takes_list(kind: Any) -> bool:
    """Whether a setting of this type is a list."""
    return any(typing.get_origin(part) in (tuple, list) for part in (kind, *typing.get_args(kind)))
