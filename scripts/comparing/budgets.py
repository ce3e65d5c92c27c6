"""The curves of ``scripts/budget_curve.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparing.recipes import Options, answers, estimate
from comparing.report import axes_of, number, percent, save
from vtprune_train.bench.runs import Asked, Cells, Run, as_overrides
from vtprune_train.bench.tasks import Task
from vtprune_train.pruning import PruningMethod, method_class
from vtprune_train.pruning.learned import learns
from vtprune_train.viz.draw import INK, SOFT

ANY, EACH, DENSE = "any budget", "each budget", "dense"  # what a curve's models are trained for
COLORS = {ANY: "#2f6fdb", EACH: "#e08a1e", DENSE: "#667085"}


def at(method: str, budget: float, num_layers: int) -> PruningMethod | None:
    """The method at a budget; ``None`` (dense) at 1.

    Raises:
        ValueError: the method cannot reach it.
    """
    return None if budget >= 1 else method_class(method)().for_budget(budget, num_layers)


# For each budget and kind of curve, the runs and the method that their models answer with.
Plan = dict[float, dict[str, tuple[list[Run], PruningMethod | None]]]


def curve(
    tasks: Sequence[Task], method: str, budgets: Sequence[float], any_budget: Sequence[str], common: Sequence[str],
    options: Options,
) -> dict[str, Any]:  # fmt: skip
    """Train all models, and answer the questions at every budget.

    Args:
        tasks: the tasks.
        method: name of the method.
        budgets: mean shares of visual tokens that enter a layer. Those that the method cannot reach are left out.
        any_budget: settings, beside the method with its defaults, of the one model for all of them.
        common: settings of all runs.
        options: see :class:`~comparing.recipes.Options`.

    Raises:
        ValueError: the method reaches none of the budgets, or has learned parameters, which the dense model lacks.
    """
    if learns(method_class(method)()):
        raise ValueError(f"--method {method} has learned parameters, which a model trained dense lacks; choose another")
    asked, plans, left_out = [], {}, {}
    for task in tasks:
        methods: dict[float, PruningMethod | None] = {}
        for budget in budgets:
            try:
                methods[budget] = at(method, budget, task.num_layers)
            except ValueError as error:
                left_out[f"{budget:g}"] = str(error)
        if not any(methods.values()):
            raise ValueError(f"--budgets: {method} reaches none of them: {next(iter(left_out.values()), 'all are 1')}")

        def runs(*overrides: str, task: Task = task) -> list[Run]:
            return [Run(task, (*common, *overrides), options.steps, seed, options.root) for seed in options.seeds]

        plans[task.name] = plan = {
            budget: {
                ANY: (runs(*as_overrides(method_class(method)()), *any_budget), one),
                EACH: (runs(*as_overrides(one)), one),
                DENSE: (runs(*as_overrides(None)), one),
            }
            for budget, one in methods.items()
        }
        asked += [Asked(run, (one,)) for curves in plan.values() for several, one in curves.values() for run in several]
    cells = options.cells()
    options.complete(asked, cells)
    return {
        "method": method,
        "any_budget": list(any_budget),
        "steps": options.steps,
        "seeds": list(options.seeds),
        "images": options.images,
        "left_out": left_out,
        "tasks": {task.name: points(task, plans[task.name], cells, options.images) for task in tasks},
    }


def points(task: Task, plan: Plan, cells: Cells, num_images: int) -> dict[str, dict[str, Any]]:
    """The points of each curve, by its budget."""
    images = [question.sample for question in task.questions(num_images)]
    found: dict[str, dict[str, Any]] = {kind: {} for kind in COLORS}
    for budget, curves in plan.items():
        for kind, (runs, method) in curves.items():
            right = answers(runs, method, cells)
            assert right is not None
            seconds = [run.cost()["seconds"] for run in runs]
            point = estimate(right, None, images)
            found[kind][f"{budget:g}"] = {**point, "seconds": sum(seconds) / len(seconds)}
    return found


def curve_table(result: dict[str, Any]) -> str:
    """Markdown: one table for each task."""
    lines = [
        "# Exact match against the budget: numbers",
        "",
        f"{result['method']}, {result['steps']} steps each. Exact match in percent on the questions about "
        f"{result['images']} held-out images, mean ± standard error over {len(result['seeds'])} seed"
        f"{'s' * (len(result['seeds']) > 1)} and the images. Budget: mean share of visual tokens that enter a layer. "
        f"Seconds: of training, mean over the seeds. Written by `scripts/budget_curve.py`.",
    ]
    for task, curves in result["tasks"].items():
        budgets = list(curves[ANY])
        lines += [
            "",
            f"## {task}",
            "",
            f"| trained for | seconds | {' | '.join(budgets)} |",
            "|---" * (len(budgets) + 2) + "|",
        ]
        for kind, points in curves.items():
            seconds = sorted({point["seconds"] for point in points.values()})
            span = " to ".join(number(one, None, 0) for one in dict.fromkeys((seconds[0], seconds[-1])))
            cells = [percent(points[budget]["exact_match"], points[budget]["error"]) for budget in budgets]
            lines.append(f"| {kind} | {span} | {' | '.join(cells)} |")
    lines += ["", f"- {ANY}: one model, trained with {', '.join(f'`{one}`' for one in result['any_budget'])}"]
    lines += [f"- {EACH}: one model for each column", f"- {DENSE}: one model, pruned without training"]
    lines += [f"- budget {budget} left out: {reason}" for budget, reason in result["left_out"].items()]
    return "\n".join(lines) + "\n"


def curve_plot(result: dict[str, Any], path: Path) -> None:
    """One panel for each task."""
    figure, axes = axes_of(len(result["tasks"]), 4.2)
    for axis, (task, curves) in zip(axes, result["tasks"].items(), strict=True):
        for kind, points in curves.items():
            places = sorted(points, key=float)
            axis.errorbar(
                [float(place) for place in places], [100 * points[place]["exact_match"] for place in places],
                yerr=[100 * points[place]["error"] for place in places],
                fmt="o-", color=COLORS[kind], markersize=5, linewidth=1.6, capsize=2.5,
                label=f"{kind}, pruned without training" if kind == DENSE else f"trained for {kind}",
            )  # fmt: skip
        axis.set_title(task, loc="left", color=INK, fontweight="bold")
        axis.set_xlabel("budget: share of visual tokens that enter a layer", color=SOFT)
        axis.set_ylabel("exact match, %", color=SOFT)
        axis.legend(frameon=False, labelcolor=INK)
    figure.suptitle(
        f"{result['method']}, {result['steps']} steps, {len(result['seeds'])} seed(s), standard errors over seeds and "
        "images", x=0.01, ha="left", color=SOFT, fontsize=10,
    )  # fmt: skip
    save(figure, path)
