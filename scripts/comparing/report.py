"""Tables and plots of ``scripts/compare_methods.py`` and ``scripts/budget_curve.py``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtprune_train.viz.draw import INK, PAPER, RULE, SOFT

OWN, ALL, DENSE = "#2f6fdb", "#e08a1e", "#1d2433"  # colors of the models as trained, on all tokens, and of dense


def write(result: dict[str, Any], folder: Path, name: str, text: str) -> None:
    """Write ``NAME.json`` and ``NAME.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text)
    print(f"\n{text}\nwrote {folder / name}.json, .md and .png")


def percent(value: float | None, error: float | None = None, sign: str = "") -> str:
    """A share in percent, with its standard error."""
    if value is None:
        return "-"
    shown = f"{100 * value:{sign}.1f}"
    return shown if error is None else f"{shown} ± {100 * error:.1f}"


def number(value: float, error: float | None, digits: int) -> str:
    """A number with its standard error."""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def recipes_table(result: dict[str, Any]) -> str:
    """Markdown of the comparison: one table for each task."""
    steps, seeds = result["steps"], result["seeds"]
    if result["equal"] == "time":
        how = f"Each row trains for as many steps as fit into the time of {steps} dense steps"
    else:
        how = f"Each row trains for {steps} steps"
    lines = [
        "# Methods and recipes: numbers",
        "",
        f"{how}. Exact match in percent on the questions about {result['images']} held-out images, mean ± standard "
        f"error over {len(seeds)} seed{'s' * (len(seeds) > 1)} and the images. Δ: difference to dense with the same "
        "seeds and questions. Written by `scripts/compare_methods.py`.",
    ]
    for task, rows in result["tasks"].items():
        lines += [
            "",
            f"## {task}",
            "",
            "| trained with | tokens | time of a step | steps | seconds | FLOPs | as trained | Δ | on all tokens | Δ |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name, row in rows.items():
            own, full = row["as_trained"] or {}, row["all_tokens"] or {}
            cells = [
                name, "-" if row["taken_share"] is None else f"{row['taken_share']:.2f}",
                number(row["step_ratio"], row["step_ratio_error"], 2), str(row["steps"]),
                number(row["seconds"], row["seconds_error"], 1), f"{row['flop_ratio']:.2f}",
            ]  # fmt: skip
            for found in (own, full):
                cells.append(percent(found.get("exact_match"), found.get("error")))
                cells.append(percent(found.get("difference"), found.get("difference_error"), "+"))
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *(f"- {name}: {row['note']}" for name, row in rows.items() if row["note"])]
    lines += [
        "",
        f"tokens: share of the visual tokens that enter a layer, when answering. Time of a step: relative to dense, "
        f"measured in turn over {result['measured_steps']} steps. Seconds: measured in training, mean over the seeds.",
    ]
    return "\n".join(lines).rstrip() + "\n"


def axes_of(count: int, height: float) -> Any:
    """A figure with ``count`` plots side by side, and their axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, count, figsize=(6.6 * count + 0.6, height), squeeze=False, facecolor=PAPER, layout="constrained"
    )
    for axis in axes[0]:
        axis.grid(color=RULE, linewidth=0.7)
        axis.set_axisbelow(True)
        axis.tick_params(colors=INK, length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    return figure, axes[0]


def save(figure: Any, path: Path) -> None:
    """Write the figure and close it."""
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)


def spaced(heights: Sequence[float], gap: float) -> list[float]:
    """``heights``, moved as little as needed to be ``gap`` apart, in the same order."""
    order = np.argsort(heights, kind="stable")
    groups: list[list[float]] = []  # of neighbors that touch: the sum of their wishes, and their number
    for rank in order:
        groups.append([heights[rank], 1])
        while len(groups) > 1 and _center(groups[-1]) - _center(groups[-2]) < gap * (groups[-1][1] + groups[-2][1]) / 2:
            last = groups.pop()
            groups[-1] = [groups[-1][0] + last[0], groups[-1][1] + last[1]]
    moved = [_center(group) + gap * (place - (group[1] - 1) / 2) for group in groups for place in range(int(group[1]))]
    result = [0.0] * len(heights)
    for rank, height in zip(order, moved, strict=True):
        result[rank] = height
    return result


def _center(group: Sequence[float]) -> float:
    return group[0] / group[1]


def recipes_plot(result: dict[str, Any], path: Path) -> None:
    """Exact match as trained against training seconds, with standard errors; names to the right."""
    tasks = result["tasks"]
    figure, axes = axes_of(len(tasks), 0.26 * max(map(len, tasks.values())) + 3.2)
    for axis, (task, rows) in zip(axes, tasks.items(), strict=True):
        rows = {name: row for name, row in rows.items() if row["as_trained"]}
        x = np.array([row["seconds"] for row in rows.values()])
        y = np.array([100 * row["as_trained"]["exact_match"] for row in rows.values()])
        errors = np.array([100 * row["as_trained"]["error"] for row in rows.values()])
        low, high = (y - errors).min(), (y + errors).max()
        room = max(high - low, 5.0)
        labels = spaced(y.tolist(), room * 1.15 / (len(rows) + 3))
        width = max(x.max() - x.min(), 0.2 * x.max())
        left, right = x.min() - 0.12 * width, x.max() + 0.12 * width
        for index, (name, row) in enumerate(rows.items()):
            color = DENSE if name.startswith(("none", "dense")) else OWN
            axis.errorbar(
                x[index], y[index], xerr=row["seconds_error"], yerr=errors[index],
                fmt="o", markersize=6, color=color, elinewidth=1.2, capsize=2, alpha=0.9,
            )  # fmt: skip
            axis.plot([x[index], right], [y[index], labels[index]], color=RULE, linewidth=0.8, zorder=0)
            text = f"{'dense' if name == 'none' else name}  {y[index]:.1f}"
            axis.text(right, labels[index], f" {text}", va="center", fontsize=9, color=color, clip_on=False)
        bottom, top = min(low, *labels) - 0.04 * room, max(high, *labels) + 0.04 * room
        axis.set(xlim=(left, right + 0.9 * (right - left)), ylim=(bottom, top))
        axis.set_xticks([tick for tick in axis.get_xticks() if left <= tick <= right])
        axis.set_title(task, loc="left", color=INK, fontweight="bold")
        axis.set_xlabel("seconds of training", color=SOFT, loc="left")
        axis.set_ylabel("exact match, %", color=SOFT)
    equal = "equal training time" if result["equal"] == "time" else f"{result['steps']} steps each"
    figure.suptitle(
        f"{equal}, {len(result['seeds'])} seed(s), standard errors over seeds and images",
        x=0.01, ha="left", color=SOFT, fontsize=10,
    )  # fmt: skip
    save(figure, path)
