"""The matrix of ``scripts/compare_methods.py --matrix``: trained with one method, answered with another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparing.recipes import Options, at_budget
from vtprune_train.bench.runs import Asked, Run, as_overrides, cell_name
from vtprune_train.bench.tasks import Task
from vtprune_train.viz.draw import INK, PAPER, SOFT


def train_infer(
    names: Sequence[str], task: Task, budget: float, common: Sequence[str], options: Options
) -> dict[str, Any]:
    """Train a model with each method (``none``: dense) and answer the questions with every method."""
    methods = {name: at_budget(name, budget, task.num_layers) for name in names}
    runs = {
        name: Run(task, (*common, *as_overrides(method)), options.steps, options.seeds[0], options.root)
        for name, (method, _) in methods.items()
    }
    every, cells = tuple(method for method, _ in methods.values()), options.cells()
    options.complete([Asked(run, every) for run in runs.values()], cells)

    def cell(run: Run, name: str) -> dict[str, Any]:
        found = cells.of(run.folder, cell_name(methods[name][0]))
        assert found is not None
        return {key: found[key] for key in ("exact_match", "taken_share", "reason")}

    return {
        "budget": budget,
        "steps": options.steps,
        "questions": len(task.questions(options.images)),
        "methods": {
            name: {"settings": None if method is None else method.settings(), "note": note, **runs[name].cost()}
            for name, (method, note) in methods.items()
        },
        "matrix": {name: {other: cell(run, other) for other in names} for name, run in runs.items()},
    }


def markdown(result: dict[str, Any]) -> str:
    """Markdown tables of the matrix and the training costs."""
    matrix, methods = result["matrix"], result["methods"]
    names = list(matrix)

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    lines = [
        "# Train with one method, evaluate with another: numbers",
        "",
        f"Exact match in percent on {result['questions']} held-out questions, after {result['steps']} steps, at "
        f"{result['budget']:g} of the visual tokens. Rows: method used in training; columns: method used in "
        "evaluation. Written by `scripts/compare_methods.py`.",
        "",
        "| trained with | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
        *(f"| {name} | " + " | ".join(percent(matrix[name][o]["exact_match"]) for o in names) + " |" for name in names),
        "",
        "| trained with | FLOPs, of dense | selector, of FLOPs | enter a layer | leave a layer | loss |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, own in methods.items():
        lines.append(
            f"| {name} | {own['flop_ratio']:.3f} | {own['selector_share']:.2%} | "
            f"{own['entering_share']:.3f} | {own['leaving_share']:.3f} | {own['final_loss']:.3f} |"
        )
    reasons = {(o, cell["reason"]) for row in matrix.values() for o, cell in row.items() if cell["reason"]}
    lines += ["", *(f"- {name}: {own['note']}" for name, own in methods.items() if own["note"])]
    lines += [f"- {name}, not available: {reason}" for name, reason in sorted(reasons)]
    return "\n".join(lines).rstrip() + "\n"


def heat_map(result: dict[str, Any], path: Path) -> None:
    """Heat map: rows are training methods, columns inference methods."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    names = list(result["matrix"])
    values = np.array(
        [[result["matrix"][n][o]["exact_match"] for o in names] for n in names], dtype=np.float64
    )  # None becomes NaN
    side = 2.6 + 0.78 * len(names)
    figure, axis = plt.subplots(figsize=(side + 0.8, side), facecolor=PAPER, layout="constrained")
    colors = plt.get_cmap("Blues").with_extremes(bad="#eef0f4")
    low, high = np.nanmin(values), np.nanmax(values)
    axis.imshow(values, cmap=colors, vmin=low - 0.02, vmax=high + 0.02)
    middle = (low + high) / 2
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        text = "-" if np.isnan(value) else f"{100 * value:.0f}"
        weight = "bold" if row == column else "normal"
        color = PAPER if value > middle else INK
        axis.text(column, row, text, ha="center", va="center", color=color, fontsize=11, fontweight=weight)
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right", color=INK, fontsize=11)
    axis.set_yticks(range(len(names)), names, color=INK, fontsize=11)
    axis.set_xlabel("answered with", color=SOFT, fontsize=12)
    axis.set_ylabel("trained with", color=SOFT, fontsize=12)
    title = f"Exact match, %: {result['steps']} steps, {result['budget']:g} of the visual tokens"
    axis.set_title(title, color=INK, fontsize=13, fontweight="bold", loc="left")
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
