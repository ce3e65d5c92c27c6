"""The command line: ``train.py`` and ``vtprune``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NoReturn

from vtprune_train import __version__
from vtprune_train.processes import signals
from vtprune_train.processes.console import start_logging

# Slow imports are inside functions, so that signal handlers are installed first.

log = logging.getLogger("vtprune_train")

# The commands other than train and launch: a summary, and a module with add_arguments(parser) and run(arguments), which
# returns the exit code and raises ValueError for what a user can fix.
COMMANDS = {
    "quickstart": (
        "vtprune_train.cli.quickstart",
        "train a tiny model on drawn images, in a few minutes on two CPU cores",
    ),
    "generate": ("vtprune_train.cli.generate", "answer a prompt about images and videos"),
    "eval": ("vtprune_train.cli.evaluate", "answer the questions of a data file; report visual tokens and times"),
    "show": ("vtprune_train.cli.show", "draw which visual tokens of an image or video are kept in each stage"),
    "estimate": ("vtprune_train.cli.estimate", "estimate tokens, FLOPs and KV cache with pruning, compared with dense"),
    "methods": ("vtprune_train.cli.methods", "list the pruning methods with their settings and papers"),
    "search": ("vtprune_train.cli.search", "find the fewest tokens for each layer, or the best schedule for a budget"),
    "bench-methods": ("vtprune_train.cli.bench_methods", "compare methods at equal budgets on the same questions"),
    "convert": ("vtprune_train.cli.convert", "convert checkpoints from and to the original LLaVA code"),
    "checkpoint": ("vtprune_train.cli.checkpoint", "list, verify, convert and delete checkpoints"),
    "export": ("vtprune_train.cli.export", "export a checkpoint's model or projector in half precision"),
}
# The modules of the extras in pyproject.toml, by the names under which they are imported.
EXTRAS = {
    "train": ("deepspeed", "peft", "accelerate", "datasets", "pyarrow", "tokenizers", "sentencepiece", "google", "yaml",
              "PIL", "av", "filelock", "psutil", "jinja2", "tqdm", "tensorboard"),
    "viz": ("matplotlib",),
}  # fmt: skip


TRAIN_SUMMARY = "train a vision-language model, in this process"
LAUNCH_SUMMARY = "train in several processes; takes the options of torchrun and of train"


class TrainParser(argparse.ArgumentParser):
    """Explains how to write settings if one is written as an option, and lists the recipes if ``--config`` is
    missing."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: --"):
            message += f"; settings are key=value without dashes{_meant(message)}, for example train.epochs=3"
        if message.endswith("required: --config"):
            from vtprune_train.config.paths import recipe_names

            message += f"; name your YAML file, or one of {', '.join(recipe_names())}"
        super().error(message)


def _meant(message: str) -> str:
    """The setting that an unknown option is in other libraries."""
    from vtprune_train.config.messages import OTHER_NAMES

    name = message.partition("--")[2].partition("=")[0].split()[0].replace("-", "_")
    return f" ({name}: use {OTHER_NAMES[name]})" if name in OTHER_NAMES else ""


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    from vtprune_train.cli.settings_help import add_help

    add_help(parser)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file: a path, or the name of a recipe")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="describe the run without training")
    parser.add_argument("--gpus", type=int, metavar="N", help="with --dry_run: number of GPUs (default: this job's)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="with --dry_run: memory of a GPU; says what fits")
    parser.add_argument(
        "--strict", action="store_true", help="train.resume=strict: stop if the newest checkpoint is damaged"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, for example train.clip=1.0")


def train_main(argv: Sequence[str] | None = None) -> int:
    """``train.py``: returns the exit code (0: finished, 2: wrong settings or data, 143: stopped by SIGTERM)."""
    if argv is None:  # None on the command line; tests and notebooks pass a list
        signals.STOP.listen()
    with _extras_named():
        parser = TrainParser(prog="train.py", description="Train a vision-language model.", add_help=False)
        add_train_arguments(parser)
        return run_train(parser.parse_intermixed_args(argv))


def run_train(arguments: argparse.Namespace) -> int:
    """Load the settings, then train or describe the run."""
    if arguments.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    if signals.asked_to_stop():
        return 0
    start_logging()
    from vtprune_train.config.errors import ConfigError
    from vtprune_train.config.load import load_config

    try:
        strict = ["train.resume=strict"] if arguments.strict else []
        config = load_config(arguments.config, [*arguments.overrides, *strict])
        if arguments.dry_run:
            from vtprune_train.training.dry_run import describe

            gpus = int(os.environ.get("WORLD_SIZE", "1")) if arguments.gpus is None else arguments.gpus
            if gpus < 1:
                raise ConfigError(f"--gpus {gpus} is below 1")
            if arguments.memory is not None and not 0 < arguments.memory < math.inf:
                raise ConfigError(f"--memory {arguments.memory:g} is not a positive number of GiB, for example 80")
            print(describe(config, gpus, arguments.memory, _names_data(arguments)))
            return 0
        if arguments.gpus is not None or arguments.memory is not None:
            raise ConfigError(
                "--gpus and --memory need --dry_run; the launcher sets the number of processes that train"
            )
        from vtprune_train.training.process import train
        from vtprune_train.viz.evaluation_images import EvaluationImages

        return train(config, [EvaluationImages()])
    except ConfigError as error:
        return _refuse("the settings are wrong", error)
    except ValueError as error:
        log.debug("traceback", exc_info=True)
        return _refuse("cannot train", error)


def _names_data(arguments: argparse.Namespace) -> bool:
    """Whether the user says where the data is. The recipes of the package name data that most users do not have."""
    from vtprune_train.config.inherit import read_chain
    from vtprune_train.config.paths import PACKAGED_CONFIGS, find_file

    chain = read_chain(find_file(arguments.config, "--config"))
    of_user = [tree for path, tree in chain if path.resolve().parent != PACKAGED_CONFIGS]
    if len(of_user) == len(chain):
        return True
    keys = [override.partition("=")[0].split(".")[:2] for override in arguments.overrides]
    keys += [["data", key] for tree in of_user if isinstance(tree.get("data"), dict) for key in tree["data"]]
    return any(key in (["data"], ["data", "root"], ["data", "train"], ["data", "eval"]) for key in keys)


def _refuse(what: str, error: ValueError) -> int:
    from vtprune_train.config.errors import refusal

    if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # once per machine, because files may differ between machines
        print(refusal(what, error), file=sys.stderr)
    return signals.final_exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """``vtprune``: returns the exit code (2 for what a user can fix)."""
    try:
        with _extras_named():
            return _main(argv)
    except BrokenPipeError:  # the reader of the pipe has exited, as in `vtprune methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python exits
        return 128 + signal.SIGPIPE


def _main(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["launch"] and not {"-h", "--help"} & set(words):
        if argv is None:
            signals.quit_on_signals()
        code = _launch(words[1:])
        if argv is None:
            signals.ignore_signals()  # the first signal decided the exit code
        return code
    if words[:1] == ["train"] and argv is None:
        signals.STOP.listen()
    kind = TrainParser if words[:1] == ["train"] else argparse.ArgumentParser
    parser = kind(
        prog="vtprune",
        description="Train and run vision-language models that drop visual tokens inside the forward pass.",
        epilog="`vtprune COMMAND --help` describes a command, `vtprune train --help KEY` a setting.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=22),
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    _add_train(commands, words)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name in words[:1]:
            implementation = importlib.import_module(module)
            implementation.add_arguments(command)
            command.set_defaults(run=implementation.run)
    arguments = parser.parse_args(words)
    if arguments.command == "train":
        return run_train(arguments)
    return _run_command(arguments)


def _add_train(commands: Any, words: Sequence[str]) -> None:
    """Add the subcommands ``train`` and ``launch`` (only for its help). Their options are added only if the command is
    used."""
    train = commands.add_parser("train", help=TRAIN_SUMMARY, add_help=False)
    launch = commands.add_parser("launch", help=LAUNCH_SUMMARY, usage=signals.LAUNCH_USAGE, add_help=False)
    if words[:1] == ["train"]:
        add_train_arguments(train)
    if words[:1] == ["launch"]:
        from vtprune_train.cli.settings_help import add_help

        add_help(launch)


@contextlib.contextmanager
def _extras_named() -> Iterator[None]:
    """Context manager: if an import fails because an extra is not installed, print how to install it and exit with code
    2."""
    try:
        yield
    except ImportError as error:  # not always a ModuleNotFoundError: transformers looks for packages by itself
        missing = {extra: [name for name in names if find_spec(name) is None] for extra, names in EXTRAS.items()}
        extra = next((extra for extra, names in missing.items() if names), None)
        if extra is None:
            raise
        print(
            f"{error}\nNot installed: {', '.join(missing[extra])}. Install what this command needs with:\n"
            f'  pip install "vtprune-train[{extra}]"',
            file=sys.stderr,
        )
        raise SystemExit(2) from None


def _launch(arguments: Sequence[str]) -> int:
    from vtprune_train.cli.launch import launch
    from vtprune_train.config.errors import ConfigError

    start_logging()
    try:
        return launch(arguments)
    except ConfigError as error:
        return _refuse("the settings are wrong", error)
    except ValueError as error:
        return _refuse("vtprune launch", error)


def _run_command(arguments: argparse.Namespace) -> int:
    start_logging()
    try:
        if getattr(arguments, "trust_remote_code", False) or getattr(arguments, "family", None):
            from vtprune_train.cli.options import load_user_code

            load_user_code(arguments)
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except ValueError as error:
        log.debug("traceback", exc_info=True)
        return _refuse(f"vtprune {arguments.command}", error)
    except OSError as error:  # about a file that an option names
        if error.filename is None:
            raise
        log.debug("traceback", exc_info=True)
        return _refuse(f"vtprune {arguments.command}", ValueError(f"{error.filename}: {error.strerror}"))
