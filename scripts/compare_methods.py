#!/usr/bin/env python
"""Train the quickstart's model with each method and without pruning, evaluate each model with each method, and write
the result matrix.

    python scripts/compare_methods.py                                   # docs/methods/train_infer.{json,md,png}
    python scripts/compare_methods.py --steps 150 --methods random,pyramiddrop --out runs/compare_methods

Finished runs and cells are reused, so an interrupted comparison can be resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vtprune_train.bench.calibration import pruned_by  # noqa: E402
from vtprune_train.data.synthetic import write_dataset  # noqa: E402
from vtprune_train.evaluation.answering import Loaded, batch, load, open_image  # noqa: E402
from vtprune_train.evaluation.questions import Question, normalized, read_questions  # noqa: E402
from vtprune_train.evaluation.timing import measured_answers  # noqa: E402
from vtprune_train.models.patch import backend_for  # noqa: E402
from vtprune_train.pruning import CONFIG_KEY, METHODS, NONE, PruningMethod, method_class  # noqa: E402
from vtprune_train.pruning.learned import learns  # noqa: E402
from vtprune_train.viz.draw import INK, PAPER, SOFT  # noqa: E402

DATA = Path("runs/data/quickstart")
CONFIG = Path("configs/quickstart.yaml")
NUM_TRAIN, NUM_EVAL, DATA_SEED = 6000, 500, 7
MAX_NEW_TOKENS = 8
DEFAULT = "random,uniform,pool,pyramiddrop,sparsevlm,plphp,fastv,divprune,visionzip,hidrop"
NAME = "train_infer"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=DEFAULT, help=f"of {', '.join(METHODS)} (default: {DEFAULT})")
    parser.add_argument("--budget", type=float, default=0.5, help="mean share of visual tokens that enter a layer")
    parser.add_argument("--steps", type=int, default=400, help="training steps per run")
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs")
    parser.add_argument("--questions", type=int, default=200, help="number of evaluation images")
    parser.add_argument("--batch_size", type=int, default=50, help="evaluation batch size")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare_methods"), help="folder for runs and results")
    parser.add_argument("--out", type=Path, default=Path("docs/methods"), help="output folder for table and plot")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all runs")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    tree = yaml.safe_load(CONFIG.read_text())
    num_layers = tree["model"]["config"]["text_config"]["num_hidden_layers"]
    names = [NONE, *(name for name in arguments.methods.split(",") if name != NONE)]
    methods = {name: at_budget(name, arguments.budget, num_layers) for name in names}
    write_dataset(DATA, num_train=NUM_TRAIN, num_eval=NUM_EVAL, seed=DATA_SEED)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = {name: pool.submit(trained, name, method, tree, arguments) for name, (method, _) in methods.items()}
        runs = {name: job.result() for name, job in jobs.items()}
    cells = Cells(arguments.runs / "cells.json", {"questions": arguments.questions})
    questions, _ = read_questions(DATA / "eval.json", DATA / "images", arguments.questions)
    for name in names:
        fill(name, runs[name], methods, questions, cells, arguments.batch_size)
    result = {
        "budget": arguments.budget,
        "steps": arguments.steps,
        "questions": len(questions),
        "methods": {
            name: {"settings": None if method is None else method.settings(), "note": note, **record(runs[name])}
            for name, (method, note) in methods.items()
        },
        "matrix": {name: {other: cells.of(runs[name], other) for other in names} for name in names},
    }
    write(result, arguments.out)
    return 0


def at_budget(name: str, budget: float, num_layers: int) -> tuple[PruningMethod | None, str | None]:
    """Return the method at the given budget; if that is not possible, with default settings and the reason."""
    if name == NONE:
        return None, None
    kind = method_class(name)
    try:
        return kind().for_budget(budget, num_layers), None
    except ValueError as error:
        return kind(), f"with its defaults: {error}"


def trained(name: str, method: PruningMethod | None, tree: dict[str, Any], arguments: argparse.Namespace) -> Path:
    """Train a run unless a finished run with the same settings exists; return its folder."""
    config = {
        **tree,
        "run": {**tree["run"], "name": name, "output_dir": str(arguments.runs)},
        "pruning": {"method": NONE} if method is None else method.settings(),
        "train": {
            **tree["train"], "max_steps": arguments.steps, "save_every": arguments.steps, "keep_last": 1,
            "eval_every": None, "eval_show": 0,
        },
    }  # fmt: skip
    folder, file = arguments.runs / name, arguments.runs / f"{name}.yaml"
    asked = yaml.safe_dump({"config": config, "overrides": arguments.overrides})
    marker = arguments.runs / f"{name}.asked"
    if not marker.is_file() or marker.read_text() != asked:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        marker.write_text(asked)
        file.write_text(yaml.safe_dump(config))
    latest = folder / "checkpoints" / "latest"
    if latest.is_file() and latest.read_text().strip() == f"step_{arguments.steps:08d}":
        print(f"{name}: already trained", flush=True)
        return folder
    print(f"{name}: training", flush=True)
    began = time.perf_counter()
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "train.py", "--config", str(file), *arguments.overrides]
    with (arguments.runs / f"{name}.log").open("ab") as log:
        code = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
    if code:
        raise SystemExit(f"{name}: training failed (exit code {code}); see {arguments.runs / f'{name}.log'}")
    print(f"{name}: trained in {time.perf_counter() - began:.0f} s", flush=True)
    return folder


class Cells:
    """Result matrix on disk, updated after each cell. A cell is valid only for the same ``shared`` settings."""

    def __init__(self, path: Path, shared: dict[str, Any]):
        self.path, self.shared = path, shared
        self.known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def key(self, run: Path, other: str) -> str:
        """Cell key; changes if the run is retrained."""
        trained_at = (run / "checkpoints" / "latest").stat().st_mtime_ns
        return json.dumps([run.name, trained_at, other, self.shared])

    def of(self, run: Path, other: str) -> dict[str, Any] | None:
        return self.known.get(self.key(run, other))

    def put(self, run: Path, other: str, cell: dict[str, Any]) -> None:
        self.known[self.key(run, other)] = cell
        self.path.write_text(json.dumps(self.known, indent=1) + "\n")


def fill(
    name: str,
    run: Path,
    methods: dict[str, tuple[PruningMethod | None, str | None]],
    questions: Sequence[Question],
    cells: Cells,
    batch_size: int,
) -> None:
    """Evaluate the model trained with ``name`` with every method."""
    if all(cells.of(run, other) is not None for other in methods):
        return
    loaded = load(str(run), None, device="cpu")
    attention = backend_for(loaded.model)
    prompts = [([open_image(path) for path in question.images], question.turns) for question in questions]
    batches = [batch(loaded, prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
    for other, (method, _) in methods.items():
        if cells.of(run, other) is None:
            cell = ask(loaded, method, batches, questions, attention)
            cells.put(run, other, cell)
            shown = cell["reason"] if cell["exact_match"] is None else f"{cell['exact_match']:.1%}"
            print(f"trained with {name}, answered with {other}: {shown}", flush=True)


def ask(
    loaded: Loaded, method: PruningMethod | None, batches: Sequence[Any], questions: Sequence[Question], attention: str
) -> dict[str, Any]:
    """Exact match and the measured token share (cache-pruning methods: share of kept keys)."""
    saved = getattr(loaded.model.config, CONFIG_KEY, None) or {}
    if method is not None and learns(method) and saved.get("method") != method.name:
        return {
            "exact_match": None,
            "taken_share": None,
            "reason": "requires learned parameters that this model does not have",
        }
    with pruned_by(loaded, method, attention):
        measured = [one for inputs in batches for one in measured_answers(loaded, inputs, MAX_NEW_TOKENS)]
    right = [
        normalized(one.answer) == normalized(question.reference)
        for one, question in zip(measured, questions, strict=True)
    ]
    num_layers = loaded.model.config.get_text_config().num_hidden_layers
    keys = method is not None and method.key_layers(num_layers)
    taken = sum(one.cached if keys else one.entering for one in measured)
    return {
        "exact_match": sum(right) / len(right),
        "taken_share": taken / sum(one.visual_tokens[0] for one in measured),
        "reason": None,
    }


def record(run: Path) -> dict[str, Any]:
    """Training cost of a run."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    total = {key: sum(step[key] for step in steps) for key in ("flops", "flops_dense", "flops_selector")}
    visual = {key: sum(step[f"visual_tokens{key}"] for step in steps) for key in ("", "_entering", "_leaving")}
    return {
        "flop_ratio": total["flops"] / total["flops_dense"],
        "selector_share": total["flops_selector"] / total["flops"],
        "entering_share": visual["_entering"] / visual[""],
        "leaving_share": visual["_leaving"] / visual[""],
        "final_loss": sum(step["loss"] for step in steps[-20:]) / len(steps[-20:]),
    }


def write(result: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = markdown(result)
    (folder / f"{NAME}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{NAME}.md").write_text(text)
    heat_map(result, folder / f"{NAME}.png")
    print(f"\n{text}\nwrote {folder / NAME}.json, .md and .png")


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


if __name__ == "__main__":
    sys.exit(main())
