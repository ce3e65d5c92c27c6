"""The command line: ``train.py`` and ``vtprune``."""

from __future__ import annotations

import argparse
import importlib
import logging
import math
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from vtprune_train.processes import signals

# Whatever takes long to import is imported by the functions that need it, once signals are heard.

log = logging.getLogger("vtprune_train")

# The commands beside train: a module with add_arguments(parser) and run(arguments) -> exit code, which
# raises ValueError for what a user can fix; and what it does.
COMMANDS = {
    "generate": ("vtprune_train.cli.generate", "answer a prompt about pictures"),
    "eval": ("vtprune_train.cli.evaluate", "answers, visual tokens and times on a data file"),
    "show": ("vtprune_train.cli.show", "draw which visual tokens of a picture survive each stage"),
    "estimate": ("vtprune_train.cli.estimate", "tokens, FLOPs and cache, dropping beside dense"),
    "methods": ("vtprune_train.cli.methods", "the pruning methods, their settings and papers"),
    "search": ("vtprune_train.cli.search", "the least tokens a layer needs, or the best schedule for a budget"),
    "bench-methods": ("vtprune_train.cli.bench_methods", "all methods at equal budgets on the same questions"),
    "convert": ("vtprune_train.cli.convert", "checkpoints of the original LLaVA code, in and out"),
    "checkpoint": ("vtprune_train.cli.checkpoint", "list, verify, convert and prune checkpoints"),
    "export": ("vtprune_train.cli.export", "a checkpoint's model or projector in half precision"),
}


class TrainParser(argparse.ArgumentParser):
    """Tells those who write a setting as an option how it is written."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: --"):
            message += "; settings are key=value without dashes, for example train.epochs=3"
        if message.endswith("required: --config"):
            from vtprune_train.config.settings import PACKAGED_CONFIGS

            recipes = ", ".join(sorted(path.name for path in PACKAGED_CONFIGS.glob("*.yaml")))
            message += f"; name a YAML file of your own, or one of {recipes}"
        super().error(message)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML file: a path, or a name in configs/")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="print what the run would be, and stop")
    parser.add_argument("--gpus", type=int, help="for --dry_run: how many GPUs train (default: this job's)")
    parser.add_argument("--memory", type=float, metavar="GiB", help="for --dry_run: memory of a GPU, to say what fits")
    parser.add_argument("--strict", action="store_true", help="train.resume=strict: refuse a damaged newest checkpoint")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help="set by launchers")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, for example train.clip=1.0")


def train_main(argv: Sequence[str] | None = None) -> int:
    """``train.py``: returns the exit code (0 done, 2 wrong settings or data, 143 stopped by SIGTERM)."""
    if argv is None:  # this process is its own, not a test's or a notebook's
        signals.STOP.listen()
    parser = TrainParser(prog="train.py", description="Train a vision-language model with token dropping.")
    add_train_arguments(parser)
    return run_train(parser.parse_intermixed_args(argv))


def run_train(arguments: argparse.Namespace) -> int:
    """Load the settings, then train or describe."""
    if arguments.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    if signals.asked_to_stop():
        return 0
    _start_logging()
    from vtprune_train.config.load import load_config
    from vtprune_train.config.settings import ConfigError

    try:
        strict = ["train.resume=strict"] if arguments.strict else []
        config = load_config(arguments.config, [*arguments.overrides, *strict])
        if arguments.dry_run:
            from vtprune_train.training.dry_run import describe

            gpus = int(os.environ.get("WORLD_SIZE", "1")) if arguments.gpus is None else arguments.gpus
            if gpus < 1:
                raise ConfigError(f"--gpus {gpus}: at least one GPU is needed")
            if arguments.memory is not None and not 0 < arguments.memory < math.inf:
                raise ConfigError(f"--memory {arguments.memory:g}: a positive number of GiB is needed, for example 80")
            print(describe(config, gpus, arguments.memory, _names_data(arguments)))
            return 0
        if arguments.gpus is not None or arguments.memory is not None:
            raise ConfigError("--gpus and --memory are for --dry_run; a launcher decides how many processes train")
        from vtprune_train.training.process import train
        from vtprune_train.viz.evaluation_images import EvaluationImages

        return train(config, [EvaluationImages()])
    except ConfigError as error:
        return _refuse("the settings are wrong", error)
    except ValueError as error:
        log.debug("where it came from", exc_info=True)
        return _refuse("cannot train", error)


def _names_data(arguments: argparse.Namespace) -> bool:
    """Whether it is the user who says where the data is: a recipe of the package names what is seldom there."""
    from vtprune_train.config.settings import PACKAGED_CONFIGS, find_file

    if find_file(arguments.config, "--config").resolve().parent != PACKAGED_CONFIGS:
        return True
    keys = [override.partition("=")[0].split(".")[:2] for override in arguments.overrides]
    return any(key in (["data"], ["data", "root"], ["data", "train"], ["data", "eval"]) for key in keys)


def _refuse(what: str, error: ValueError) -> int:
    from vtprune_train.config.settings import refusal

    if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # on every machine: they may not have the same files
        print(refusal(what, error), file=sys.stderr)
    return signals.final_exit(2)


def _start_logging() -> None:
    level = logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    log.setLevel(level)
    if int(os.environ.get("RANK", "0")):  # every rank finds the same in the index; the first one says it
        logging.getLogger("vtprune_train.data.index").setLevel(logging.ERROR)


def main(argv: Sequence[str] | None = None) -> int:
    """``vtprune``: returns the exit code (2 for what a user can mend)."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["launch"] and not {"-h", "--help"} & set(given):
        if argv is None:
            signals.quit_on_signals()
        code = _launch(given[1:])
        if argv is None:
            signals.ignore_signals()  # the first one has decided the exit code
        return code
    if given[:1] == ["train"] and argv is None:
        signals.STOP.listen()
    kind = TrainParser if given[:1] == ["train"] else argparse.ArgumentParser
    parser = kind(prog="vtprune", description="Visual-token pruning for training and inference.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train in this process (`vtprune launch` uses several)")
    add_train_arguments(train)
    commands.add_parser("launch", help="train in several processes, through torchrun", usage=signals.LAUNCH_USAGE)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in given[:1]:
            chosen = importlib.import_module(module)
            chosen.add_arguments(command)
            command.set_defaults(run=chosen.run)
    arguments = parser.parse_args(given)
    if arguments.command == "train":
        return run_train(arguments)
    return _run_command(arguments)


def _launch(arguments: Sequence[str]) -> int:
    from vtprune_train.cli.launch import launch
    from vtprune_train.config.settings import ConfigError

    try:
        return launch(arguments)
    except ConfigError as error:
        return _refuse("the settings are wrong", error)
    except ValueError as error:
        return _refuse("vtprune launch", error)


def _run_command(arguments: argparse.Namespace) -> int:
    _start_logging()
    try:
        if getattr(arguments, "trust_remote_code", False) or getattr(arguments, "family", None):
            from vtprune_train.cli.options import load_user_code

            load_user_code(arguments)
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads has seen enough, as `vtprune methods | head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes when it ends
        return 128 + signal.SIGPIPE
    except ValueError as error:
        log.debug("where it came from", exc_info=True)
        return _refuse(f"vtprune {arguments.command}", error)
    except OSError as error:  # a file that an option names
        if error.filename is None:
            raise
        log.debug("where it came from", exc_info=True)
        return _refuse(f"vtprune {arguments.command}", ValueError(f"{error.filename}: {error.strerror}"))
