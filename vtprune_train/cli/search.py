"""``vtprune search``: how many visual tokens each layer needs, found on calibration data.

Two ways, after Zhao et al., "Accelerating Multimodal Large Language Models by Searching Optimal Vision Token Reduction"
(arXiv 2412.00556): G-Search goes from the shallow layers to the deep ones and finds the least number each can do with;
P-Sigmoid takes the best of the sigmoid schedules that a FLOP budget allows. Levels are integers: a layer at level ``k``
of ``steps`` keeps ``k / steps`` of each image's original tokens. Layer 0 always sees all of them.
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

SLOPES = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # of the sigmoid over the depth: from nearly a line to nearly a step
Distance = Callable[[Sequence[int]], float]


def least_levels(distance: Distance, num_layers: int, steps: int, tolerance: float) -> list[int]:
    """G-Search: the least level of every layer from 1 on such that the output stays close to the dense one.

    A layer is tried with all deeper layers at its own level, by bisection, so ``distance`` should not fall when levels
    do. Published is one criterion for all layers; here the tolerance grows with the depth, to layer l of n go l / n of
    it: else the first layer would use up all of it.

    Args:
        distance: of the output under levels [num_layers - 1] from the dense output.
        steps: the level at which everything stays.
        tolerance: the largest distance.

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
    """P-Sigmoid's schedule [num_layers - 1]: the share kept falls from 1 to 0 around ``middle`` (a share of the depth),
    the more steeply the larger ``slope``; never below one level."""
    exponents = [slope * (layer / num_layers - middle) for layer in range(1, num_layers)]
    return [max(1, round(steps / (1.0 + math.exp(min(exponent, 60.0))))) for exponent in exponents]


def best_sigmoid(
    distance: Distance, cost: Callable[[Sequence[int]], float], num_layers: int, steps: int, budget: float
) -> list[int]:
    """P-Sigmoid: for each slope the latest fall that costs no more than ``budget``, and of these the closest to dense.

    Published is a Bayesian search over both parameters; with the budget met exactly only the slope is free, so a few
    are tried.
    """
    least = cost([1] * (num_layers - 1))
    if least > budget:
        raise ValueError(f"--flops={budget:g} cannot be reached; dropping from layer 1 on takes at least {least:.3f}")
    found = []
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
            found.append((distance(levels), levels))
            log.info("slope %g, middle %.3f: distance %.5f", slope, low, found[-1][0])
    return min(found, key=lambda pair: pair[0])[1] if found else [1] * (num_layers - 1)


def schedule_of(levels: Sequence[int], steps: int, settings: dict[str, Any]) -> PruningMethod | None:
    """PyramidDrop with a drop wherever the level falls; ``None`` where nothing is dropped."""
    falls = [
        (layer, level) for layer, (before, level) in enumerate(pairwise([steps, *levels]), start=1) if level < before
    ]
    if not falls:
        return None
    layers, kept = zip(*falls, strict=True)
    keep = [level / steps for level in kept]
    return method_from_settings({"method": PyramidDrop.name, **settings, "layers": list(layers), "keep": keep})


def flop_share(method: PruningMethod | None, geometry: DecoderGeometry, text: np.ndarray, visual: np.ndarray) -> float:
    """FLOPs of the decoder's layers and of ranking, as a share of the dense layers', for samples of ``text`` and
    ``visual`` tokens [samples]."""
    if method is None:
        return 1.0
    drops = method.drops(geometry.num_layers)
    lengths = stage_lengths(text, visual, np.arange(len(text)), drops)
    layers = np.array(layers_per_stage(drops, geometry.num_layers))
    projects = method.rank_with == "next_layer"
    ranking = sum(geometry.selector(n, len(text), n, projects) for n in lengths[:, :-1].sum(axis=0).tolist())
    dense = geometry.layer(lengths[:, 0]).sum() * geometry.num_layers
    return float(((geometry.layer(lengths) * layers).sum() + ranking) / dense)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model_option(parser)
    add_data_options(parser, "conversations to calibrate on")
    parser.add_argument("--out", required=True, metavar="FILE", help="YAML to write: --method FILE, or pruning=FILE")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--kl", type=float, metavar="X", help="G-Search: mean KL to the dense model's answers, in nats")
    goal.add_argument(
        "--match", type=float, metavar="X", help="G-Search: share of the dense model's answers, word for word"
    )
    goal.add_argument("--flops", type=float, metavar="X", help="P-Sigmoid: share of the dense decoder's FLOPs")
    parser.add_argument("--steps", type=int, default=50, help="levels between nothing and all")
    parser.add_argument("--limit", type=int, default=32, metavar="N", help="records, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_new_tokens", type=int, default=16)
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
        raise ValueError(f"--data={arguments.data}: none of the {len(questions)} question(s) shows an image")
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
    """PyramidDrop's settings beside the schedule. The layer's own attention ranks: so many boundaries would project
    keys again and again; and positions stay, as the model was not trained for others."""
    if arguments.steps == 1:
        raise ValueError("--steps=1 has no level between nothing and all; take at least 2")
    check_least(arguments, steps=1, batch_size=1, max_new_tokens=1)
    if arguments.kl is not None and not arguments.kl >= 0:
        raise ValueError(f"--kl={arguments.kl:g} is negative; give the largest mean KL, for example 0.05")
    for option in ("match", "flops"):
        value = getattr(arguments, option)
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"--{option}={value:g} is not in (0, 1]; it is a share")
    if not Path(arguments.out).absolute().parent.is_dir():
        raise ValueError(f"--out={arguments.out}: its folder does not exist; create it first")
    settings = {"rank_with": "this_layer", "positions": "keep", **set_values(arguments.set)}
    if given := {"layers", "keep", "method"} & set(settings):
        raise ValueError(f"--set {min(given)}: that is what is searched for; set only PyramidDrop's other settings")
    method_from_settings({"method": PyramidDrop.name, **settings})
    return settings


def searched(
    arguments: argparse.Namespace, settings: dict[str, Any], calibration: Calibration, geometry: DecoderGeometry
) -> list[int]:
    """The levels that the options ask for."""
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
    if arguments.match is not None:  # shares of few answers: 1 - 0.9 is more than 0.1 in floating point
        return least_levels(lambda found: 1 - closeness(found).match, num_layers, steps, 1 - arguments.match + 1e-9)
    return least_levels(kl, num_layers, steps, arguments.kl)


def _header(arguments: argparse.Namespace, closeness: Closeness, share: float, entering: float, questions: int) -> str:
    goal = next(
        f"--{name} {value:g}" for name in ("kl", "match", "flops") if (value := getattr(arguments, name)) is not None
    )
    return (
        f"# vtprune search {goal}, on {questions} question(s): {share:.3f} of the dense decoder's FLOPs,\n"
        f"# {entering:.3f} of the visual tokens enter a layer on average, KL to the dense answers {closeness.kl:.4f},\n"
        f"# {closeness.match:.3f} of them the same.\n"
    )


def as_yaml(method: PruningMethod, header: str) -> str:
    """A section ``pruning`` that ``train.py`` (``pruning=FILE``) and ``--method FILE`` take."""
    lines = [f"  {key}: {_value(value)}" for key, value in method.settings().items()]
    return header + "\n".join(["pruning:", *lines]) + "\n"


def _value(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else "null" if value is None else str(value)
