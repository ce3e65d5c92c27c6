"""Compares measurements with the goals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gpu_checks.speed import DENSE, DROPPING

Values = dict[str, Any]
Measured = Iterator[tuple[float, str]]  # a value and its row


@dataclass(frozen=True)
class Goal:
    """A figure and its bound. The best of several measured configurations counts."""

    figure: str
    bound: float
    at_least: bool
    measured: Callable[[Values], Measured]

    def judge(self, report: Values) -> Values:
        entry: Values = {"figure": self.figure, "goal": f"{'>=' if self.at_least else '<='} {self.bound:g}"}
        found = list(self.measured(report))
        if not found:
            return {**entry, "value": None, "verdict": "not measured"}
        value, source = (max if self.at_least else min)(found)
        met = value >= self.bound if self.at_least else value <= self.bound
        verdict = "met" if met else "not met"
        if report["run"]["device"] != "cuda":
            verdict = "not measured: this ran on a CPU"
        return {**entry, "value": value, "source": source, "verdict": verdict}


def pairs(report: Values, parts: tuple[str, ...], decoder: bool = False) -> Iterator[tuple[Values, Values, str]]:
    """Rows of a dropping step and of the dense one in the same configuration."""
    for part in parts:
        rows = report.get(part, {})
        for name, row in rows.items():
            label = name.removesuffix(f" {DROPPING}")
            dense = rows.get(f"{label} {DENSE}")
            of_decoder = part == "decoder" or label.startswith("decoder")
            if label != name and of_decoder == decoder and timed(row) and timed(dense):
                yield row, dense, f"{part}: {label}"


def timed(row: Any) -> bool:
    return isinstance(row, dict) and "ms" in row


def decoder_over_flops(report: Values) -> Measured:
    for dropping, dense, source in pairs(report, ("decoder", "compile"), decoder=True):
        yield dropping["ms"] / dense["ms"] / (dropping["tflop"] / dense["tflop"]), source


def decoder_speedup(report: Values) -> Measured:
    for dropping, dense, source in pairs(report, ("decoder", "compile"), decoder=True):
        yield dense["ms"] / dropping["ms"], source


def over_padded(report: Values) -> Measured:
    padded = report.get("seven", {}).get("eager hf_padded")
    for part in ("seven", "compile", "liger"):
        for name, row in report.get(part, {}).items():
            if name.endswith(DROPPING) and not name.startswith("decoder") and timed(row) and timed(padded):
                yield row["ms"] / padded["ms"], f"{part}: {name}"


def utilisation(method: str) -> Callable[[Values], Measured]:
    """MFU of a whole step: FLOPs without recomputation, relative to the measured rate of matrix products."""

    def measured(report: Values) -> Measured:
        peak = report.get("peaks", {}).get("matmul_tflops")
        for part in ("seven", "compile", "liger"):
            for name, row in report.get(part, {}).items():
                if name.endswith(f" {method}") and not name.startswith("decoder") and timed(row) and peak:
                    yield row["tflop_s"] / peak, f"{part}: {name}"

    return measured


def selector_share(report: Values) -> Measured:
    row = report.get("seven", {}).get(f"eager {DROPPING}", {})
    if row.get("selector_ms"):  # 0: the profiler saw no kernels
        yield row["selector_ms"] / row["ms"], f"seven: eager {DROPPING}"


def waits(report: Values) -> Measured:
    """The largest number of waits of any pass."""
    counts = [(len(row["forward"]), name) for name, row in report.get("tiny", {}).items() if name.endswith(" waits")]
    if counts:
        count, name = max(counts)
        yield float(count), f"tiny: {name}"


def recompilations(report: Values) -> Measured:
    if report.get("compile", {}).get("graphs"):  # 0: nothing was compiled
        yield float(report["compile"]["recompilations"]), "compile"


def float32_rows(report: Values) -> list[tuple[str, Values]]:
    return [(name, row) for name, row in report.get("tiny", {}).items() if name.endswith(" float32")]


def kept_differences(report: Values) -> Measured:
    if rows := float32_rows(report):
        yield max((float(sum(row["kept_differ"])), f"tiny: {name}") for name, row in rows)


def float32_error(report: Values) -> Measured:
    if rows := float32_rows(report):
        yield max((max(row["loss_error"], row["worst_gradient"][0]), f"tiny: {name}") for name, row in rows)


GOALS = (
    Goal("decoder step, PyramidDrop / dense: time ratio / FLOP ratio", 1.05, False, decoder_over_flops),
    Goal("decoder speed-up", 1.95, True, decoder_speedup),
    Goal("whole step, tower trained, PyramidDrop / transformers padded", 0.30, False, over_padded),
    Goal("MFU of the measured matmul rate, packed dense", 0.55, True, utilisation(DENSE)),
    Goal("MFU of the measured matmul rate, PyramidDrop", 0.55, True, utilisation(DROPPING)),
    Goal("selector's share of a step", 0.005, False, selector_share),
    Goal("device-to-host reads between the start of the forward pass and the loss", 0, False, waits),
    Goal("recompilations after warm-up", 0, False, recompilations),
    Goal("kept tokens that differ between device and CPU, float32", 0, False, kept_differences),
    Goal("loss and gradients, device against CPU, float32: largest relative error", 1e-5, False, float32_error),
)


def judge_all(report: Values) -> list[Values]:
    return [goal.judge(report) for goal in GOALS]


def print_goals(entries: list[Values]) -> None:
    print(f"\n{'':76}{'goal':>9}{'measured':>11}")
    for entry in entries:
        value = "" if entry["value"] is None else f"{entry['value']:.4g}"
        source = f" ({entry['source']})" if entry["value"] is not None else ""
        print(f"{entry['figure']:76}{entry['goal']:>9}{value:>11}  {entry['verdict']}{source}")
