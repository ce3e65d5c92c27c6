"""An evaluation in numbers: means of its samples, ratios of pruned to dense, and a table of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vtprune_train.evaluation.questions import normalized

RATIOS = (
    "entering",
    "leaving",
    "cached",
    "prefill_seconds",
    "prefill_flops",
    "decode_seconds_per_token",
    "cache_bytes",
)

MEANS = {
    "entering": "enter a layer, mean over layers",
    "leaving": "leave a layer (as papers count)",
    "cached": "stay in a layer's cache",
}


def summary(
    lines: Sequence[dict[str, Any]], layers: Sequence[int], left_out: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Means over the lines of ``samples.jsonl``.

    Args:
        lines: at least one.
        layers: decoder layers before which the pruned model drops.
        left_out: ``(id, reason)`` of samples that could not be asked.

    Returns:
        ``answers``; ``runs``, by name; ``left_out``; and with two runs ``ratios`` (pruned to dense) and ``agreement``
        (share of equal answers).
    """
    names = list(lines[0]["runs"])
    runs = {name: _means([line["runs"][name] for line in lines]) for name in names}
    results: dict[str, Any] = {
        "answers": len(lines),
        "drop_layers": list(layers),
        "runs": runs,
        "left_out": [{"id": sample, "reason": reason} for sample, reason in left_out],
    }
    if len(names) == 2:
        pruned, dense = (runs[name] for name in names)
        pairs = [[normalized(line["runs"][name]["answer"]) for name in names] for line in lines]
        results["agreement"] = sum(one == other for one, other in pairs) / len(lines)
        results["ratios"] = {key: _ratio(pruned[key], dense[key]) for key in RATIOS}
    return results


def _means(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    count = len(samples)
    steps = sum(sample["decode_steps"] for sample in samples)
    stages = zip(*(sample["visual_tokens"] for sample in samples), strict=True)
    return {
        "exact_match": sum(sample["exact"] for sample in samples) / count,
        "visual_tokens": [sum(stage) / count for stage in stages],
        **{key: _mean_of(samples, key) for key in ("entering", "leaving", "cached")},
        "prompt_tokens": sum(sample["prompt_tokens"] for sample in samples) / count,
        "prefill_seconds": sum(sample["prefill_seconds"] for sample in samples) / count,
        "decode_seconds_per_token": sum(sample["decode_seconds"] for sample in samples) / steps if steps else None,
        "cache_bytes": sum(sample["cache_bytes"] for sample in samples) / count,
        "prefill_flops": None if samples[0]["prefill_flops"] is None else _mean_of(samples, "prefill_flops"),
    }


def _mean_of(samples: Sequence[dict[str, Any]], key: str) -> float:
    return sum(sample[key] for sample in samples) / len(samples)


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def table(results: dict[str, Any]) -> str:
    """The results as text, a column a run."""
    runs, ratios = results["runs"], results.get("ratios", {})
    rows = [["", *runs, *(["ratio"] if ratios else [])]]

    def row(title: str, values: Sequence[str], ratio: float | None = None) -> None:
        rows.append([title, *values, *([f"{ratio:.3f}" if ratio is not None else ""] if ratios else [])])

    row("exact match", [f"{run['exact_match']:.1%}" for run in runs.values()])
    for stage, layer in enumerate([None, *results["drop_layers"]]):
        title = "visual tokens" if layer is None else f"visual tokens from layer {layer}"
        counts = [run["visual_tokens"][min(stage, len(run["visual_tokens"]) - 1)] for run in runs.values()]
        row(title, [f"{count:.1f}" for count in counts])
    for key, title in MEANS.items():
        row(title, [f"{run[key]:.1f}" for run in runs.values()], ratios.get(key))
    flops = [run["prefill_flops"] for run in runs.values()]
    shown = ["-" if count is None else f"{count / 1e9:.4g}" for count in flops]
    row("decoder's prefill, GFLOP a sample", shown, ratios.get("prefill_flops"))
    prefill = [f"{1000 * run['prefill_seconds']:.2f}" for run in runs.values()]
    row("prefill, ms a sample", prefill, ratios.get("prefill_seconds"))
    decode = [run["decode_seconds_per_token"] for run in runs.values()]
    shown = ["-" if seconds is None else f"{1000 * seconds:.2f}" for seconds in decode]
    row("decoding, ms a token", shown, ratios.get("decode_seconds_per_token"))
    cache = [f"{run['cache_bytes'] / 2**20:.3f}" for run in runs.values()]
    row("cache, MiB a sample", cache, ratios.get("cache_bytes"))
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([cells[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells[1:], widths[1:], strict=True))])
        for cells in rows
    ]
    notes = [f"{results['answers']} answers"]
    notes += [f"{results['agreement']:.1%} of them equal"] if ratios else []
    notes += [f"{len(results['left_out'])} sample(s) left out"] if results["left_out"] else []
    return "\n".join([*(line.rstrip() for line in lines), ", ".join(notes)])
