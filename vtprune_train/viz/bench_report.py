"""Reports a comparison of methods as a table and as a plot of quality against time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vtprune_train.bench.rivals import DENSE
from vtprune_train.evaluation.results import aligned
from vtprune_train.viz.draw import INK, PAPER, RULE, SOFT

BASELINES = ("random", "uniform", "pool")  # drawn in gray
COLORS = ("#1f6fb4", "#d1495b", "#0f9d8a", "#e08e0b", "#7a5195", "#5f7f2f", "#b5577e", "#3a86a8")
MARKERS = "osD^vPX*<>hdp"
LEAST_KL = 1e-5  # lower end of the logarithmic axis


def table(results: dict[str, Any]) -> str:
    """The results as text, one line per method and budget; ratios are relative to the dense model."""
    settings, rows = results["settings"], results["rows"]
    sizes = list(rows[0]["clock"])
    header = ["", "budget", "planned", "taken", "enter", "leave", "cached", "= dense", "KL", "exact", "GFLOP"]
    header += [f"{work} x{size}" for work in ("prefill", "decode", "train") for size in sizes]
    header += ["cache"]
    lines = aligned([header, *(_cells(row, sizes) for row in rows)])
    lines += ["", *_notes(settings, rows, sizes)]
    same_reason: dict[tuple[str, str], list[str]] = {}
    for absent in results["absent"]:
        same_reason.setdefault((absent["name"], absent["reason"]), []).append(f"{absent['budget']:g}")
    lines += [f"absent: {name} at {', '.join(budgets)}: {reason}" for (name, reason), budgets in same_reason.items()]
    if results["left_out"]:
        first = results["left_out"][0]
        lines.append(f"{len(results['left_out'])} sample(s) left out; the first, {first['id']}: {first['reason']}")
    return "\n".join(lines)


def _cells(row: dict[str, Any], sizes: Sequence[str]) -> list[str]:
    def ratio(values: dict[str, Any] | None) -> str:
        return "-" if values is None else f"{values['ratio']:.3f}"

    flops = row["prefill_flops"]
    clock = [row["clock"][size] for size in sizes]
    return [
        row["name"],
        "" if row["budget"] is None else f"{row['budget']:g}",
        f"{'about ' if row['adaptive'] else ''}{row['planned_share']:.3f}",
        f"{row['taken_share']:.3f}",
        f"{row['entering']:.1f}",
        f"{row['leaving']:.1f}",
        f"{row['cached']:.1f}",
        f"{row['agreement']:.1%}",
        f"{row['kl']:.4f}",
        f"{row['exact_match']:.1%}",
        "-" if flops is None else f"{flops / 1e9:.4g}",
        *(ratio(times[work]) for work in ("prefill", "decode", "train") for times in clock),
        f"{clock[-1]['cache_ratio']:.3f}",
    ]


def _notes(settings: dict[str, Any], rows: Sequence[dict[str, Any]], sizes: Sequence[str]) -> list[str]:
    dense = rows[0]["clock"]
    lines = [
        f"{settings['questions']} questions of {settings['data']}, {rows[0]['visual_tokens']:.1f} visual tokens each "
        f"on average; {settings['layers']} layers, {settings['dtype']}, {settings['device']}, {settings['attention']}",
        "planned and taken: mean share of the visual tokens that enter a layer, or whose keys stay if a method drops "
        "keys (about: the method determines it while running); enter, leave, cached: tokens, mean over the layers",
        "prefill, decode, train and cache: relative to the dense model in the same repeat, median of "
        f"{settings['repeats']}; GFLOP: decoder and selector, prefill of one question",
    ]
    for size in sizes:
        times = dense[size]
        works = [work for work in ("prefill", "decode", "train") if times[work]]
        parts = [f"{work} {1000 * times[work]['seconds']:.2f} ms" for work in works]
        peak = "" if times["peak_bytes"] is None else f", peak {max(times['peak_bytes']) / 2**30:.2f} GiB"
        lines.append(f"dense, batch {size}: {', '.join(parts)}, cache {times['cache_bytes'] / 2**20:.3f} MiB{peak}")
    for row in rows:
        refused = {times["no_training"] for times in row["clock"].values() if times["no_training"]}
        lines += [f"no training step of {row['name']}: {reason}" for reason in sorted(refused)]
    return lines


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot three panels: agreement with the dense model over the time of the prefill, exact match over the time of a
    training step, and divergence over the share of tokens. A line connects the budgets of a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = results["rows"]
    size = list(rows[0]["clock"])[-1]
    trains = any(row["clock"][size]["train"] for row in rows)
    figure, axes = plt.subplots(1, 3, figsize=(16.5, 6.2), facecolor=PAPER, layout="constrained")

    def time(work: str) -> Callable[[dict[str, Any]], float | None]:
        return lambda row: row["clock"][size][work]["ratio"] if row["clock"][size][work] else None

    second = "train" if trains else "decode"
    panels: list[tuple[Any, Callable[[dict[str, Any]], float | None], Callable[[dict[str, Any]], float], str, str]] = [
        (axes[0], time("prefill"), lambda row: 100 * row["agreement"], f"prefill time relative to dense, batch {size}",
         "agreement with the dense model (%)"),
        (axes[1], time(second), lambda row: 100 * row["exact_match"],
         f"{'training step' if trains else 'decoding'} relative to dense, batch {size}",
         "exact match with the answer (%)"),
        (axes[2], lambda row: row["taken_share"], lambda row: max(row["kl"], LEAST_KL),
         "share of visual tokens taken (mean over layers)", "KL(dense || pruned) on the answers (nats per token)"),
    ]  # fmt: skip
    for axis, across, up, xlabel, ylabel in panels:
        without_dense = [row for row in rows if row["name"] != DENSE]  # whose divergence is 0
        _panel(axis, without_dense if axis is axes[2] else rows, across, up)
        axis.set_xlabel(xlabel, color=INK)
        axis.set_ylabel(ylabel, color=INK)
    axes[0].set_ylim(-2, 104)
    axes[1].set_ylim(-2, max(10, 104 * max(row["exact_match"] for row in rows)))
    axes[2].set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=10, labelcolor=INK)
    budgets = ", ".join(f"{share:g}" for share in results["settings"]["budgets"])
    title = f"Methods at equal budgets ({budgets}): {results['settings']['questions']} questions"
    figure.suptitle(title, color=INK, fontsize=14, fontweight="bold", x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(
    axis: Any,
    rows: Sequence[dict[str, Any]],
    across: Callable[[dict[str, Any]], float | None],
    up: Callable[[dict[str, Any]], float],
) -> None:
    names = list(dict.fromkeys(row["name"] for row in rows if row["name"] != DENSE))
    methods = [name for name in names if name not in BASELINES]
    for name in names:
        of_method = sorted((row for row in rows if row["name"] == name), key=lambda row: row["budget"])
        points = [(across(row), up(row)) for row in of_method]
        drawn = [(x, y) for x, y in points if x is not None]
        if not drawn:
            continue
        baseline = name in BASELINES
        number = BASELINES.index(name) if baseline else methods.index(name)
        axis.plot(
            *zip(*drawn, strict=True),
            label=name,
            color=SOFT if baseline else COLORS[number % len(COLORS)],
            linestyle=("--", ":", "-.")[number] if baseline else "-",
            marker=MARKERS[number % len(MARKERS)],
            markersize=7,
            linewidth=1.4,
            markerfacecolor=PAPER if baseline else None,
        )
    for row in rows:
        if row["name"] == DENSE and (x := across(row)) is not None:
            axis.plot([x], [up(row)], marker="s", markersize=9, color=INK, linestyle="none", label=DENSE)
    axis.grid(color=RULE, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(colors=SOFT)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(RULE)
