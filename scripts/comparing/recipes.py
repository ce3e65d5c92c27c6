"""Rows of a comparison at equal training time: their settings, their numbers of steps, and their results."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vtprune_train.bench.runs import Asked, Cells, Run, as_overrides, cell_name, complete, single_threaded
from vtprune_train.bench.standard_errors import mean_and_error
from vtprune_train.bench.step_times import step_times
from vtprune_train.bench.tasks import TASKS, Task
from vtprune_train.config.load import load_config
from vtprune_train.config.pruning import TRAINING_ONLY
from vtprune_train.evaluation.questions import Question
from vtprune_train.pruning import METHODS, NONE, PruningMethod, method_class

RECIPES = Path(__file__).with_name("recipes.yaml")
PADDED = "dense_padded"  # the row of the dense model in transformers' code
PADDED_NOTE = (
    "dense, on padded batches in transformers' own code. Its steps give the same model, so it is trained packed; "
    "seconds are those of the packed steps times the ratio of the step times"
)


@dataclass(frozen=True)
class Row:
    """A row.

    Args:
        name: of a method or a recipe.
        overrides: settings of its training.
        method: what its model answers with.
        note: what is special about it, for the report.
    """

    name: str
    overrides: tuple[str, ...]
    method: PruningMethod | None
    note: str | None = None


def read_recipes(path: Path = RECIPES) -> dict[str, tuple[str, ...]]:
    """The recipes: name to ``key=value`` settings. A recipe is written as a list of these, or as the path of a YAML
    file in the form of ``configs/``."""
    recipes = yaml.safe_load(path.read_text()) or {}
    return {name: _settings(value) for name, value in recipes.items()}


def _settings(value: Sequence[str] | str) -> tuple[str, ...]:
    if not isinstance(value, str):
        return tuple(value)
    tree = yaml.safe_load(Path(value).read_text())
    tree.pop("base", None)
    return tuple(
        f"{section}.{key}={json.dumps(setting)}" for section, keys in tree.items() for key, setting in keys.items()
    )


def row_of(name: str, task: Task, budget: float, recipes: Mapping[str, Sequence[str]], common: Sequence[str]) -> Row:
    """A row by its name.

    Args:
        name: a recipe, a method, ``none`` or :data:`PADDED`.
        task: its recipe is what the row's settings are added to.
        budget: mean share of visual tokens that enter a layer, if the row does not set its method's settings.
        recipes: see :func:`read_recipes`.
        common: settings of all rows.

    Raises:
        ValueError: there is no such row, or one of its settings is wrong.
    """
    if name in (NONE, PADDED):
        return Row(name, (*common, *as_overrides(None)), None, PADDED_NOTE if name == PADDED else None)
    if name not in recipes and name not in METHODS:
        raise ValueError(f"{name!r} is neither a recipe ({', '.join(recipes)}) nor a method ({', '.join(METHODS)})")
    overrides = (*common, *recipes.get(name, (f"pruning.method={name}",)))
    trained = load_config(task.recipe, overrides).pruning
    keys = {override.partition("=")[0] for override in overrides if override.startswith("pruning.")}
    if isinstance(trained.method, list) or {key.split(".")[1] for key in keys} - {"method", *TRAINING_ONLY}:
        return Row(name, overrides, trained.build())
    method, note = at_budget(trained.method, budget, task.num_layers)
    return Row(name, (*overrides, *as_overrides(method)), method, note)


def at_budget(name: str, budget: float, num_layers: int) -> tuple[PruningMethod | None, str | None]:
    """The method at the given budget; if that is not possible, with default settings and the reason."""
    if name == NONE:
        return None, None
    kind = method_class(name)
    try:
        return kind().for_budget(budget, num_layers), None
    except ValueError as error:
        return kind(), f"with its defaults: {error}"


def fitted_steps(steps: int, ratio: float) -> int:
    """Steps that fit into the time of ``steps`` dense steps, if one takes ``ratio`` times as long; at least 1."""
    return max(1, math.floor(steps / ratio * (1 + 1e-9)))


def ratio_and_error(seconds: Sequence[float], dense: Sequence[float]) -> tuple[float, float]:
    """Ratio of the mean step times, and its standard error; both have taken the same steps in turn."""
    row, base = np.asarray(seconds), np.asarray(dense)
    ratio = float(row.mean() / base.mean())
    if len(row) < 2:
        return ratio, math.nan
    return ratio, float((row - ratio * base).std(ddof=1) / math.sqrt(len(row)) / base.mean())


def clock(task: Task, rows: Sequence[Row], steps: int, num_steps: int, root: Path) -> dict[str, dict[str, Any]]:
    """Step times of all rows, measured in turn in one process, while nothing else runs. Rows that were measured
    earlier, with the same settings, are not measured again; new ones are measured together with dense."""
    file = root / task.name / "step_times.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    runs = {row.name: Run(task, row.overrides, steps, 0, root) for row in rows}
    keys = {name: f"{run.folder.name} {num_steps} {name == PADDED}" for name, run in runs.items()}
    missing = [name for name, key in keys.items() if key not in known]
    if missing:
        task.write()
        folder = root / task.name / "step_times"
        shutil.rmtree(folder, ignore_errors=True)
        timed = [NONE, *(name for name in missing if name not in (NONE, PADDED))]
        here = [f"run.output_dir={folder}"]
        configs = {name: load_config(task.recipe, [*runs[name].settings(name), *here]) for name in timed}
        padded = PADDED if PADDED in missing else None
        print(f"{task.name}: measuring the steps of {', '.join(missing)}", flush=True)
        with single_threaded(), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            seconds = pool.submit(step_times, configs, padded, num_steps).result()
        shutil.rmtree(folder, ignore_errors=True)
        for name in missing:
            ratio, error = ratio_and_error(seconds[name], seconds[NONE])
            known[keys[name]] = {"ratio": ratio, "error": error, "seconds": statistics.mean(seconds[name])}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(known, indent=1) + "\n")
    return {name: known[key] for name, key in keys.items()}


@dataclass(frozen=True)
class Options:
    """What all runs share; see :func:`add_options`."""

    steps: int
    seeds: tuple[int, ...]
    images: int
    batch_size: int
    jobs: int
    root: Path

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Options:
        """The options on the command line."""
        seeds = tuple(int(seed) for seed in arguments.seeds.split(","))
        return cls(
            arguments.steps, seeds, arguments.images, arguments.batch_size, arguments.jobs, arguments.runs
        )  # fmt: skip

    def cells(self) -> Cells:
        """The answers so far."""
        return Cells(self.root / "cells.json", {"images": self.images})

    def complete(self, asked: Sequence[Asked], cells: Cells) -> None:
        """See :func:`vtprune_train.bench.runs.complete`."""
        complete(asked, cells, images=self.images, batch_size=self.batch_size, jobs=self.jobs)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of :class:`Options`, the tasks, and where results go."""
    parser.add_argument("--tasks", default=",".join(TASKS), help="tasks to train on (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=250, help="training steps, of dense if time is equal")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of weights and sample order (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs, one thread each (default: 1)")
    parser.add_argument("--images", type=int, default=300, help="held-out images whose questions are answered")
    parser.add_argument("--batch_size", type=int, default=50, help="evaluation batch size")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare_methods"), help="folder for runs and answers")
    parser.add_argument("--out", type=Path, default=Path("docs/methods"), help="output folder for tables and plots")
    parser.add_argument("--name", help="name of the files (default: that of the result)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all runs")


def compare(
    tasks: Sequence[Task], rows: Mapping[str, Sequence[Row]], equal: str, num_steps: int, options: Options
) -> dict[str, Any]:
    """Train all rows of all tasks with all seeds and answer the questions, as trained and on all tokens.

    Args:
        tasks: the tasks.
        rows: of each task, by its name; the first is dense.
        equal: ``time`` or ``steps``.
        num_steps: steps of every row that are measured.
        options: see :class:`Options`.
    """
    times = {task.name: clock(task, rows[task.name], options.steps, num_steps, options.root) for task in tasks}
    runs: dict[tuple[str, str], list[Run]] = {}
    asked = []
    for task in tasks:
        for row in rows[task.name]:
            ratio = times[task.name][row.name]["ratio"] if equal == "time" else 1.0
            of_row = [
                Run(task, row.overrides, fitted_steps(options.steps, ratio), seed, options.root)
                for seed in options.seeds
            ]
            runs[task.name, row.name] = of_row
            asked += [Asked(run, (row.method, None)) for run in of_row]
    cells = options.cells()
    # Seed by seed, so that an interrupted comparison has whole rows.
    options.complete(sorted(asked, key=lambda one: options.seeds.index(one.run.seed)), cells)
    results = {}
    for task in tasks:
        questions = task.questions(options.images)
        dense = answers(runs[task.name, NONE], None, cells)
        results[task.name] = {
            row.name: summary(row, runs[task.name, row.name], times[task.name][row.name], dense, questions, cells)
            for row in rows[task.name]
        }
    return {
        "equal": equal,
        "steps": options.steps,
        "seeds": list(options.seeds),
        "images": options.images,
        "measured_steps": num_steps,
        "tasks": results,
    }


def answers(runs: Sequence[Run], method: PruningMethod | None, cells: Cells) -> np.ndarray | None:
    """[seeds, questions], 1 where an answer is right; ``None`` if the models cannot answer with the method."""
    found = [cells.of(run.folder, cell_name(method)) for run in runs]
    right = [None if cell is None else cell["right"] for cell in found]
    if any(one is None for one in right):
        return None
    return np.array([[int(letter) for letter in one] for one in right if one is not None])


def summary(
    row: Row, runs: Sequence[Run], time: Mapping[str, Any], dense: np.ndarray | None, questions: Sequence[Question],
    cells: Cells,
) -> dict[str, Any]:  # fmt: skip
    """The results of a row: means over seeds and questions with standard errors."""
    images = [question.sample for question in questions]
    costs = [run.cost() for run in runs]
    scale = time["ratio"] if row.name == PADDED else 1.0
    seconds = [cost["seconds"] * scale for cost in costs]
    result: dict[str, Any] = {
        "settings": list(row.overrides),
        "note": row.note,
        "step_ratio": time["ratio"],
        "step_ratio_error": time["error"],
        "steps": runs[0].steps,
        "seconds": statistics.mean(seconds),
        "seconds_error": statistics.stdev(seconds) / math.sqrt(len(seconds)) if len(seconds) > 1 else None,
        **{key: statistics.mean(cost[key] for cost in costs) for key in ("flop_ratio", "entering_share", "final_loss")},
    }
    for key, method in (("as_trained", row.method), ("all_tokens", None)):
        right = answers(runs, method, cells)
        result[key] = None if right is None else estimate(right, dense, images)
    shares = [cell["taken_share"] for run in runs if (cell := cells.of(run.folder, cell_name(row.method)))]
    result["taken_share"] = statistics.mean(shares) if all(share is not None for share in shares) else None
    return result


def estimate(right: np.ndarray, dense: np.ndarray | None, images: Sequence[str]) -> dict[str, Any]:
    """Exact match and its difference to dense (same seeds, same questions), with standard errors."""
    mean, error = mean_and_error(right, images)
    result: dict[str, Any] = {"exact_match": mean, "error": error, "seeds": right.mean(axis=1).tolist()}
    if dense is not None:
        difference, of_difference = mean_and_error(right - dense, images)
        result |= {"difference": difference, "difference_error": of_difference}
    return result
