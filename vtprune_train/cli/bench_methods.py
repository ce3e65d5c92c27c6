"""``vtprune bench-methods``: compare methods at equal budgets on the same model and questions."""

from __future__ import annotations

import argparse
import json
import logging
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vtprune_train.bench.calibration import Calibration, Quality, calibrate, quality
from vtprune_train.bench.latency import clocked, summarized
from vtprune_train.bench.rivals import Rival, rivals_of
from vtprune_train.cli.options import (
    add_data_options,
    add_model_option,
    add_place_options,
    asked_questions,
    check_least,
    numbers,
)
from vtprune_train.core.flops import is_adaptive
from vtprune_train.evaluation.answering import Loaded, Prompt, batch, load, open_image
from vtprune_train.evaluation.questions import Question, as_answered
from vtprune_train.pruning import METHODS
from vtprune_train.viz.bench_report import plot, table

log = logging.getLogger(__name__)

RESULTS, PLOT = "bench_methods.json", "bench_methods.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model_option(parser)
    add_data_options(parser, "conversations, in any format that training reads")
    budget_help = "mean shares of the visual tokens that enter a layer, for example 0.5,0.25,0.1"
    parser.add_argument("--budget", type=numbers(float, "0.5,0.25,0.1"), default=[0.5, 0.25, 0.1], help=budget_help)
    parser.add_argument("--methods", metavar="A,B", help=f"any of {', '.join(METHODS)} (default: all)")
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="use N random records (default: 64)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random records")
    parser.add_argument(
        "--batch_size", type=int, default=8, metavar="N", help="batch size of the untimed answers (default: 8)"
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=16, metavar="N", help="maximum tokens of an answer (default: 16)"
    )
    parser.add_argument(
        "--time_batch", type=numbers(int, "1,8"), default=[1, 8], help="batch sizes to time, for example 1,8"
    )
    parser.add_argument(
        "--time_tokens", type=int, default=8, metavar="N", help="number of tokens of a timed answer (default: 8)"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="number of timed repetitions (default: 5)")
    parser.add_argument("--skip_training", action="store_true", help="do not time training steps")
    parser.add_argument("--out", metavar="DIR", help="output folder (default: runs/bench_methods/MODEL)")
    add_place_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compare, print the table, write the JSON file and the plot."""
    _check(arguments)
    names = list(METHODS) if arguments.methods is None else arguments.methods.split(",")
    questions, prompts, left_out = _with_images(arguments)
    loaded = load(arguments.model, None, device=arguments.device, dtype=arguments.dtype)
    calibration = calibrate(loaded, prompts, arguments.max_new_tokens, arguments.batch_size)
    rivals, absent = rivals_of(names, arguments.budget, loaded, calibration.attention)
    log.info("comparing %d pairs of method and budget; %d are not possible", len(rivals) - 1, len(absent))
    qualities = _qualities(calibration, rivals, questions, prompts, arguments)
    times = clocked(
        loaded,
        rivals,
        prompts,
        sizes=arguments.time_batch,
        repeats=arguments.repeats,
        new_tokens=arguments.time_tokens,
        train=not arguments.skip_training,
        attention=calibration.attention,
    )
    clock = {str(size): summarized(seconds) for size, seconds in times.items()}
    results = {
        "settings": _settings(arguments, loaded, calibration, len(questions)),
        "rows": [_row(rival, qualities[rival.title], clock, loaded) for rival in rivals],
        "absent": [asdict(one) for one in absent],
        "left_out": [{"id": sample, "reason": reason} for sample, reason in left_out],
    }
    folder = Path(arguments.out or Path("runs") / "bench_methods" / Path(arguments.model).resolve().name)
    _write(folder, results)
    print(table(results))
    print(f"\nwrote {folder / RESULTS} and {folder / PLOT}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    check_least(arguments, samples=1, batch_size=1, max_new_tokens=1, time_tokens=2, repeats=1)
    if wrong := [share for share in arguments.budget if not 0 < share < 1]:
        raise ValueError(f"--budget: {wrong[0]:g} is not between 0 and 1 (a share of the visual tokens)")
    if wrong := [size for size in arguments.time_batch if size < 1]:
        raise ValueError(f"--time_batch: {wrong[0]} is below 1")


def _with_images(arguments: argparse.Namespace) -> tuple[list[Question], list[Prompt], list[tuple[str, str]]]:
    """The questions with an image, their prompts, and ``(id, reason)`` of each skipped record."""
    everything, left_out = asked_questions(arguments, arguments.samples)
    questions: list[Question] = []
    prompts: list[Prompt] = []
    for question in everything:
        if not question.images:
            left_out.append((question.sample, "it has no image, so every method runs dense"))
            continue
        try:
            prompts.append(([open_image(path) for path in question.images], question.turns))
        except ValueError as error:
            left_out.append((question.sample, str(error)))
        else:
            questions.append(question)
    if not questions:
        raise ValueError(f"none of the {len(everything)} question(s) has an image; the first: {left_out[0][1]}")
    return questions, prompts, left_out


def _qualities(
    calibration: Calibration,
    rivals: Sequence[Rival],
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    arguments: argparse.Namespace,
) -> dict[str, Quality]:
    size, tokenizer = arguments.batch_size, calibration.loaded.processor.tokenizer
    references = [as_answered(question.reference, tokenizer) for question in questions]
    batches = [batch(calibration.loaded, prompts[i : i + size]) for i in range(0, len(prompts), size)]
    qualities: dict[str, Quality] = {}
    dense: tuple[str, ...] | None = None
    for rival in tqdm(rivals, desc="quality", unit="method"):
        qualities[rival.title] = quality(
            calibration, batches, references, rival.method, dense, arguments.max_new_tokens
        )
        dense = dense or qualities[rival.title].answers  # the dense model is the first
    return qualities


def _row(rival: Rival, measured_quality: Quality, clock: dict[str, dict[str, Any]], loaded: Loaded) -> dict[str, Any]:
    num_layers = loaded.model.config.get_text_config().num_hidden_layers
    method = rival.method
    measured = {key: value for key, value in asdict(measured_quality).items() if key != "answers"}
    counted_by = "cached" if method is not None and method.key_layers(num_layers) else "entering"
    return {
        "name": rival.name,
        "budget": rival.budget,
        "settings": None if method is None else method.settings(),
        "planned_share": 1.0 if method is None else method.input_share(num_layers),
        "taken_share": measured[counted_by] / measured_quality.visual_tokens,
        "counted_by": counted_by,
        "adaptive": method is not None and is_adaptive(method, num_layers),
        **measured,
        "clock": {size: times[rival.title] for size, times in clock.items()},
    }


def _settings(
    arguments: argparse.Namespace, loaded: Loaded, calibration: Calibration, questions: int
) -> dict[str, Any]:
    device = loaded.model.device
    cpu = f"CPU ({platform.machine()}), {torch.get_num_threads()} thread(s)"
    return {
        "model": arguments.model,
        "data": arguments.data,
        "questions": questions,
        "seed": arguments.seed,
        "max_new_tokens": arguments.max_new_tokens,
        "budgets": arguments.budget,
        "layers": loaded.model.config.get_text_config().num_hidden_layers,
        "repeats": arguments.repeats,
        "attention": calibration.attention,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def _write(folder: Path, results: dict[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
        plot(results, folder / PLOT)
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot be written ({error})") from error
