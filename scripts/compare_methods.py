#!/usr/bin/env python
"""Train a tiny model with many methods and recipes for equal time on one core, and compare the answers.

    python scripts/compare_methods.py --jobs 2                          # docs/methods/recipes.{json,md,png}
    python scripts/compare_methods.py --rows random,pyramiddrop --tasks text --seeds 0 --steps 60 --out runs/try
    python scripts/compare_methods.py --matrix --steps 400              # docs/methods/train_infer.{json,md,png}

A row is a method at --budget, or a recipe of scripts/comparing/recipes.yaml. First, steps of all rows are measured in
turn, in one process; nothing else should run on the machine. Then each row trains for as many steps as fit into the
time of --steps dense steps (--equal steps: all for --steps), with every seed, and its models answer the questions as
they were trained and on all tokens. --matrix trains a model with each method, and answers with every method. Finished
runs, measurements and answers are reused, so an interrupted comparison can be resumed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from comparing.matrix import heat_map, markdown, train_infer  # noqa: E402
from comparing.recipes import PADDED, Options, add_options, compare, read_recipes, row_of  # noqa: E402
from comparing.report import recipes_plot, recipes_table, write  # noqa: E402
from vtprune_train.bench.tasks import tasks_of  # noqa: E402
from vtprune_train.pruning import METHODS, NONE  # noqa: E402

METHODS_COMPARED = "random,uniform,pool,pyramiddrop,sparsevlm,plphp,fastv,divprune,visionzip,hidrop"


def main() -> int:
    recipes = read_recipes()
    arguments = parser(recipes).parse_args()
    os.chdir(ROOT)
    options, tasks = Options.of(arguments), tasks_of(arguments.tasks)
    if arguments.matrix:
        names = [NONE, *(name for name in (arguments.rows or METHODS_COMPARED).split(",") if name != NONE)]
        result = train_infer(names, tasks[0], arguments.budget, arguments.overrides, options)
        write(result, arguments.out, "train_infer", markdown(result))
        heat_map(result, arguments.out / "train_infer.png")
        return 0
    names = [NONE, *(arguments.rows or ",".join([PADDED, METHODS_COMPARED, *recipes])).split(",")]
    rows = {
        task.name: [row_of(name, task, arguments.budget, recipes, arguments.overrides) for name in dict.fromkeys(names)]
        for task in tasks
    }
    result = compare(tasks, rows, arguments.equal, arguments.measured_steps, options)
    result = {"budget": arguments.budget, **result}
    name = arguments.name or "recipes"
    write(result, arguments.out, name, recipes_table(result))
    recipes_plot(result, arguments.out / f"{name}.png")
    return 0


def parser(recipes: Iterable[str]) -> argparse.ArgumentParser:
    """The options; ``recipes`` are named in the help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", "--methods", metavar="NAMES",
        help=f"methods ({', '.join(METHODS)}), recipes ({', '.join(recipes)}) and {PADDED}, separated by commas; "
        f"default: {PADDED}, {METHODS_COMPARED} and all recipes",
    )  # fmt: skip
    parser.add_argument("--budget", type=float, default=0.5, help="mean share of visual tokens that enter a layer")
    parser.add_argument("--equal", choices=("time", "steps"), default="time", help="what is equal in training")
    parser.add_argument("--measured_steps", type=int, default=24, help="steps of each row that are timed")
    parser.add_argument("--matrix", action="store_true", help="answer with every method, on the first of the tasks")
    add_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
