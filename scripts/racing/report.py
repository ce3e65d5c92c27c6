"""The result of a race: numbers of each row, table and plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from racing.setup import Setup

BASELINE = "trainer_padded"
WARM_UP = 1  # steps left out of the speed
SORTED = "trainer_length_grouped"  # its first step has the longest samples, so that every step counts
# The row with the FLOPs of the same model and samples. Sorted samples (trainer_length_grouped) are not the same ones.
COUNTED_BY = {
    "trainer_padded": "loop_dense",
    "trl_sft": "loop_dense",
    "llamafactory": "loop_dense",
    "ms_swift": "loop_dense",
    "trainer_pack": "loop_dense",
    "trainer_prune": "loop_prune",
}


def rows_of(all_runs: Mapping[str, Sequence[Mapping[str, Any]]], setup: Setup) -> list[dict[str, Any]]:
    """The rows of the report. The project's loop counts the FLOPs of a step, for the other rows as well."""
    flops = {name: runs[0]["flops"] for name, runs in all_runs.items() if name.startswith("loop_")}
    return [row_of(name, runs, flops.get(COUNTED_BY.get(name, name), []), setup) for name, runs in all_runs.items()]


def row_of(name: str, runs: Sequence[Mapping[str, Any]], flops: Sequence[float], setup: Setup) -> dict[str, Any]:
    """A row of the report from its repeats: medians of the speeds, maximum of the memory, losses of the first one.
    ``flops``: of each step; empty if unknown."""
    warm_up = 0 if name == SORTED else WARM_UP
    speeds = [speed_of(run, setup, warm_up) for run in runs]
    peak = runs[0]["peak_flops"]
    seconds = statistics.median(sum(run["seconds"][WARM_UP:]) for run in runs)
    return {
        "name": name,
        "samples_per_second": statistics.median(speed["samples"] for speed in speeds),
        "samples_per_second_repeats": [speed["samples"] for speed in speeds],
        "tokens_per_second": statistics.median(speed["tokens"] for speed in speeds),
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "mfu": sum(flops[WARM_UP:]) / seconds / peak if peak and flops else None,
        "losses": runs[0]["losses"],
        "step_seconds": [run["seconds"] for run in runs],
        "load_average": [run["load_average"] for run in runs],
        "settings": runs[0]["settings"],
    }


def speed_of(run: Mapping[str, Any], setup: Setup, warm_up: int) -> dict[str, float]:
    """Samples and real tokens (without padding, before dropping) per second."""
    seconds = sum(run["seconds"][warm_up:])
    samples = setup.global_batch * (setup.steps - warm_up)
    return {"samples": samples / seconds, "tokens": sum(run["tokens"][warm_up:]) / seconds}


def table(report: Mapping[str, Any]) -> list[str]:
    """A Markdown table."""
    rows = report["rows"]
    baseline = next((row for row in rows if row["name"] == BASELINE), None)
    lines = [
        "| | samples/s | tokens/s | relative to padded | peak memory, GB | MFU | first loss | last loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = f"{row['samples_per_second'] / baseline['samples_per_second']:.2f}x" if baseline else ""
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        lines.append(
            f"| `{row['name']}` | {row['samples_per_second']:.3f} | {row['tokens_per_second']:.0f} | {ratio} | "
            f"{row['peak_memory_bytes'] / 1e9:.2f} | {mfu} | {row['losses'][0]:.4f} | {row['losses'][-1]:.4f} |"
        )
    return lines


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Bars of speed and memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = report["rows"][::-1]
    names = [row["name"] for row in rows]
    colors = ["tab:blue" if name.split("_")[-1] in ("pack", "prune", "dense") else "tab:gray" for name in names]
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.5 + 0.4 * len(rows)), layout="constrained", sharey=True)
    numbers = {
        "samples per second": [row["samples_per_second"] for row in rows],
        "peak memory (GB)": [row["peak_memory_bytes"] / 1e9 for row in rows],
    }
    for axis, (label, values) in zip(axes, numbers.items(), strict=True):
        axis.bar_label(axis.barh(names, values, color=colors), fmt="%.2f", padding=3)
        axis.set_xlabel(label)
        axis.margins(x=0.15)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
