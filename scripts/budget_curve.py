#!/usr/bin/env python
"""Exact match against the share of visual tokens: one model for any budget, one model for each budget, and a dense
model that is pruned without training.

    python scripts/budget_curve.py --jobs 2                             # docs/methods/budget_curve.{json,md,png}
    python scripts/budget_curve.py --tasks text --budgets 0.25,0.5 --seeds 0 --steps 60 --out runs/try

All models train for the same number of steps. Runs and answers are those of scripts/compare_methods.py, where the
settings are equal, and are reused.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from comparing.budgets import curve, curve_plot, curve_table  # noqa: E402
from comparing.recipes import Options, add_options  # noqa: E402
from comparing.report import write  # noqa: E402
from vtprune_train.bench.tasks import tasks_of  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="pyramiddrop", help="pruning method (default: %(default)s)")
    parser.add_argument(
        "--budgets", default="0.2,0.35,0.5,0.75,1", metavar="SHARES", help="mean shares of visual tokens that enter a "
        "layer (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--any_budget", nargs="+", metavar="key=value",
        help="settings that train one model for all budgets (default: pruning.budgets, from the lowest to the highest)",
    )  # fmt: skip
    add_options(parser)
    arguments = parser.parse_args()
    os.chdir(ROOT)
    budgets = [float(share) for share in arguments.budgets.split(",")]
    any_budget = arguments.any_budget or [f"pruning.budgets=[{min(budgets):g}, {max(budgets):g}]"]
    options = Options.of(arguments)
    result = curve(tasks_of(arguments.tasks), arguments.method, budgets, any_budget, arguments.overrides, options)
    name = arguments.name or "budget_curve"
    write(result, arguments.out, name, curve_table(result))
    curve_plot(result, arguments.out / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
