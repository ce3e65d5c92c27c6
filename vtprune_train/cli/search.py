"""``vtprune search``: search the number of visual tokens that each layer needs, on calibration data.

Two algorithms from Zhao et al., "Accelerating Multimodal Large Language Models by Searching Optimal Vision Token
Reduction" (arXiv 2412.00556): G-Search goes from the shallow layers to the deep ones and finds the smallest number that
each needs; P-Sigmoid picks the best sigmoid schedule within a FLOP budget. Levels are integers: a layer at level ``k``
of ``steps`` keeps ``k / steps`` of each image's original tokens. Layer 0 always sees all tokens.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vtprune_train.bench.calibration import Calibration, Closeness, calibrate, prompts_with_images
from vtprune_train.cli.options import (
    add_data_options,
    add_model_option,
    add_place_options,
    add_set_option,
    asked_questions,
    check_least,
    set_values,
)
from vtprune_train.core.flops import DecoderGeometry, layers_per_stage, stage_lengths
from vtprune_train.evaluation.answering import load, open_image
from vtprune_train.pruning import method_from_settings
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.methods.pyramiddrop import PyramidDrop

log = logging.getLogger(__name__)

SLOPES = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # of the sigmoids over the depth: from almost linear to almost a step
Distance = Callable[[Sequence[int]], float]


def least_levels(distance: Distance, num_layers: int, steps: int, tolerance: float) -> list[int]:
    """G-Search: the smallest level of every layer from 1 on that keeps the output close to the dense one.

    The level of a layer is found by bisection, with all deeper layers at the same level; this assumes that ``distance``
    does not decrease when levels decrease. The paper has one tolerance for all layers; here layer l of n gets l / n of
    it, or the first layer would use all of it.

    Args:
        distance: a function of the levels [num_layers - 1]: the distance of the output from the dense output.
        steps: the level at which all tokens are kept.
        tolerance: the largest distance allowed.

    Returns:
        [num_layers - 1], not increasing, each in [1, steps].
    """
    levels: list[int] = []
    high = steps
    for layer in range(1, num_layers):
        allowed = tolerance * layer / (num_layers - 1)
        low = 1
        while low < high:
            middle = (low + high) // 2
            if distance([*levels, *[middle] * (num_layers - layer)]) <= allowed:
                high = middle
            else:
                low = middle + 1
        levels.append(high)
        log.info("layer %d of %d: keeps %d / %d", layer, num_layers, high, steps)
    return levels


def sigmoid_levels(num_layers: int, steps: int, slope: float, middle: float) -> list[int]:
    """P-Sigmoid's schedule [num_layers - 1]: the keep ratio falls from 1 to 0 around ``middle`` (a share of the depth),
    steeper for a larger ``slope``; at least level 1."""
    exponents = [slope * (layer / num_layers - middle) for layer in range(1, num_layers)]
    return [max(1, round(steps / (1.0 + math.exp(min(exponent, 60.0))))) for exponent in exponents]


def best_sigmoid(
    distance: Distance, cost: Callable[[Sequence[int]], float], num_layers: int, steps: int, budget: float
) -> list[int]:
    """P-Sigmoid: for each slope, the latest fall within ``budget``; returns the schedule that is closest to dense.

    The paper uses a Bayesian search over both parameters. If the budget is met exactly, only the slope is free, so a
    few slopes are tried.
    """
    least = cost([1] * (num_layers - 1))
    if least > budget:
        raise ValueError(f"--flops={budget:g} cannot be reached; dropping from layer 1 on costs at least {least:.3f}")
    schedules = []
    for slope in SLOPES:
        low, high = -60.0 / slope, 1.0 + 60.0 / slope
        for _ in range(60):
            middle = (low + high) / 2
            if cost(sigmoid_levels(num_layers, steps, slope, middle)) <= budget:
                low = middle
            else:
                high = middle
        levels = sigmoid_levels(num_layers, steps, slope, low)
        if cost(levels) <= budget:
            schedules.append((distance(levels), levels))
            log.info("slope %g, middle %.3f: distance %.5f", slope, low, schedules[-1][0])
    return min(schedules, key=lambda pair: pair[0])[1] if schedules else [1] * (num_layers - 1)


def schedule_of(levels: Sequence[int], steps: int, settings: dict[str, Any]) -> PruningMethod | None:
    """PyramidDrop with a drop at each decrease of the level; ``None`` if nothing is dropped."""
    falls = [
        (layer, level) for layer, (before, level) in enumerate(pairwise([steps, *levels]), start=1) if level < before
    ]
    if not falls:
        return None
    layers, kept = zip(*falls, strict=True)
    keep = [level / steps for level in kept]
    return method_from_settings({"method": PyramidDrop.name, **settings, "layers": list(layers), "keep": keep})


def flop_share(method: PruningMethod | None, geometry: DecoderGeometry, text: np.ndarray, visual: np.ndarray) -> float:
    """FLOPs of decoder layers and ranking relative to the dense decoder layers, for samples with ``text`` and
    ``visual`` tokens [samples]."""
    if method is None:
        return 1.0
    drops = method.drops(geometry.num_layers)
    lengths = stage_lengths(text, visual, np.arange(len(text)), drops)
    layers = layers_per_stage(drops, geometry.num_layers)
    projects = method.needs.rank_with == "next_layer"
    ranking = sum(geometry.selector(n, len(text), n, projects) for n in lengths[:, :-1].sum(axis=0).tolist())
    dense = geometry.stages(lengths[:, :1], [geometry.num_layers]).sum()
    return float((geometry.stages(lengths, layers).sum() + ranking) / dense)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model_option(parser)
    add_data_options(parser, "conversations to calibrate on")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="YAML file to write, for --method FILE and pruning=FILE"
    )
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--kl", type=float, metavar="X", help="G-Search: largest mean KL divergence from the dense model, in nats"
    )
    goal.add_argument(
        "--match", type=float, metavar="X", help="G-Search: smallest share of answers equal to the dense model's"
    )
    goal.add_argument(
        "--flops", type=float, metavar="X", help="P-Sigmoid: budget, as a share of the dense decoder's FLOPs"
    )
    parser.add_argument(
        "--steps", type=int, default=50, metavar="N", help="number of levels between no tokens and all (default: 50)"
    )
    parser.add_argument("--limit", type=int, default=32, metavar="N", help="use N random records (default: 32)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random records")
    parser.add_argument("--batch_size", type=int, default=4, metavar="N", help="questions in a batch (default: 4)")
    parser.add_argument(
        "--max_new_tokens", type=int, default=16, metavar="N", help="maximum tokens of an answer (default: 16)"
    )
    add_set_option(parser)
    add_place_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Search, print the schedule, write the YAML."""
    settings = _checked(arguments)
    questions, malformed = asked_questions(arguments, arguments.limit)
    for sample, reason in malformed:
        log.warning("left out %s: %s", sample, reason)
    prompts = list(prompts_with_images(questions, open_image))
    if not prompts:
        raise ValueError(f"--data={arguments.data}: none of the {len(questions)} question(s) has an image")
    loaded = load(arguments.model, None, device=arguments.device, dtype=arguments.dtype)
    geometry = DecoderGeometry.of(loaded.model.config.get_text_config())
    calibration = calibrate(loaded, prompts, arguments.max_new_tokens, arguments.batch_size)
    levels = searched(arguments, settings, calibration, geometry)
    method = schedule_of(levels, arguments.steps, settings)
    if method is None:
        raise ValueError(
            "no token can be dropped from any layer at this tolerance; allow a larger --kl or lower --match"
        )
    closeness = calibration.closeness(method)
    share = flop_share(method, geometry, calibration.text, calibration.visual)
    entering = method.input_share(geometry.num_layers)
    written = as_yaml(method, _header(arguments, closeness, share, entering, len(prompts)))
    Path(arguments.out).write_text(written)
    print(written, end="")
    return 0


def _checked(arguments: argparse.Namespace) -> dict[str, Any]:
    """PyramidDrop's settings other than the schedule. By default ``rank_with`` is this_layer, because next_layer would
    project keys at each of many drop points, and ``positions`` is keep, because the model was not trained otherwise."""
    if arguments.steps == 1:
        raise ValueError("--steps=1 is below 2")
    check_least(arguments, steps=1, batch_size=1, max_new_tokens=1)
    if arguments.kl is not None and not arguments.kl >= 0:
        raise ValueError(f"--kl={arguments.kl:g} is negative; set the largest mean KL, for example 0.05")
    for option in ("match", "flops"):
        value = getattr(arguments, option)
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"--{option}={value:g} is not in (0, 1]")
    if not Path(arguments.out).absolute().parent.is_dir():
        raise ValueError(f"--out={arguments.out}: its folder does not exist; create it first")
    settings = {"rank_with": "this_layer", "positions": "keep", **set_values(arguments.set)}
    if searched_for := {"layers", "keep", "method"} & set(settings):
        raise ValueError(f"--set {min(searched_for)}: the search decides it; set only other settings of PyramidDrop")
    method_from_settings({"method": PyramidDrop.name, **settings})
    return settings


def searched(
    arguments: argparse.Namespace, settings: dict[str, Any], calibration: Calibration, geometry: DecoderGeometry
) -> list[int]:
    """Run the search that the options choose; returns the levels."""
    known: dict[tuple[int, ...], Closeness] = {}

    def closeness(levels: Sequence[int]) -> Closeness:
        key = tuple(levels)
        if key not in known:
            known[key] = calibration.closeness(schedule_of(levels, arguments.steps, settings))
        return known[key]

    def cost(levels: Sequence[int]) -> float:
        method = schedule_of(levels, arguments.steps, settings)
        return flop_share(method, geometry, calibration.text, calibration.visual)

    def kl(levels: Sequence[int]) -> float:
        return closeness(levels).kl

    num_layers, steps = geometry.num_layers, arguments.steps
    if arguments.flops is not None:
        return best_sigmoid(kl, cost, num_layers, steps, arguments.flops)
    if arguments.match is not None:  # in floating point, 1 - 0.9 is below 0.1
        return least_levels(lambda levels: 1 - closeness(levels).match, num_layers, steps, 1 - arguments.match + 1e-9)
    return least_levels(kl, num_layers, steps, arguments.kl)


def _header(arguments: argparse.Namespace, closeness: Closeness, share: float, entering: float, questions: int) -> str:
    goal = next(
        f"--{name} {value:g}" for name in ("kl", "match", "flops") if (value := getattr(arguments, name)) is not None
    )
    return (
        f"# vtprune search {goal}, on {questions} question(s): {share:.3f} of the dense decoder's FLOPs,\n"
        f"# {entering:.3f} of the visual tokens enter a layer on average, KL to the dense answers {closeness.kl:.4f},\n"
        f"# {closeness.match:.3f} of the answers are the same.\n"
    )


def as_yaml(method: PruningMethod, header: str) -> str:
    """The section ``pruning`` for ``pruning=FILE`` and ``--method FILE``."""
    lines = [f"  {key}: {_value(value)}" for key, value in method.settings().items()]
    return header + "\n".join(["pruning:", *lines]) + "\n"


def _value(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else "null" if value is None else str(value)
