"""Training runs of a comparison, and the answers of their models. Both are reused after an interruption.

A run is identified by its settings: its folder has a hash of them in its name, so that comparisons that need the same
model share it. An answered cell belongs to a run, the method that the model answers with, and the questions.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from vtprune_train.bench.calibration import pruned_by
from vtprune_train.bench.tasks import Task
from vtprune_train.config.load import dump_config, load_config
from vtprune_train.config.settings import Config
from vtprune_train.evaluation.answering import Loaded, batch, load, open_image
from vtprune_train.evaluation.questions import Question, normalized
from vtprune_train.evaluation.timing import measured_answers
from vtprune_train.files.disk import replace_synced
from vtprune_train.models.patch import backend_for
from vtprune_train.pruning import CONFIG_KEY, NONE, PruningMethod
from vtprune_train.pruning.learned import learns

MAX_NEW_TOKENS = 8


@dataclass(frozen=True)
class Run:
    """A training run.

    Args:
        task: what it trains on.
        overrides: ``key=value`` settings, added to the task's recipe.
        steps: optimizer steps; the learning-rate schedule spans them.
        seed: of the weights and of the order of the samples.
        root: folder of all runs.
    """

    task: Task
    overrides: tuple[str, ...]
    steps: int
    seed: int
    root: Path

    def settings(self, name: str) -> list[str]:
        """All ``key=value`` settings; ``name`` is the name of the run's folder."""
        ours = [
            f"run.seed={self.seed}", f"train.max_steps={self.steps}", f"train.save_every={self.steps}",
            "train.keep_last=1", "train.export=last", "train.eval_every=null", "train.eval_show=0", "data.eval=[]",
            "train.eval_shuffled=false", "train.trackers=[]", f"run.output_dir={self.root / self.task.name}",
            f"run.name={name}",
        ]  # fmt: skip
        return [*self.overrides, *ours]

    def config(self, name: str = "any") -> Config:
        """See :meth:`settings`.

        Raises:
            ConfigError: an override is wrong.
        """
        return load_config(self.task.recipe, self.settings(name))

    @cached_property
    def folder(self) -> Path:
        """The run's folder."""
        config = self.config()
        settings = yaml.safe_load(dump_config(config))
        del settings["run"]["output_dir"], settings["run"]["name"]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
        method = config.pruning.method if isinstance(config.pruning.method, str) else "combination"
        name = "".join(letter if letter.isalnum() or letter == "_" else "_" for letter in method)
        return self.root / self.task.name / f"{name}-{self.steps}-{digest}"

    @property
    def trained(self) -> bool:
        """Whether the run is finished."""
        latest = self.folder / "checkpoints" / "latest"
        return latest.is_file() and latest.read_text().strip() == f"step_{self.steps:08d}"

    def train(self) -> float:
        """Train in a subprocess on one thread, unless the run is finished; returns the seconds that it took.

        Raises:
            RuntimeError: training failed.
        """
        folder = self.folder
        if self.trained:
            return 0.0
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        file, log = folder.with_suffix(".yaml"), folder.with_suffix(".log")
        file.write_text(dump_config(self.config(folder.name)))
        began = time.perf_counter()
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "vtprune_train.cli", "train", "--config", str(file)]
        with log.open("wb") as output:
            code = subprocess.run(command, env=environment, stdout=output, stderr=output).returncode
        if code:
            raise RuntimeError(f"training failed (exit code {code}); see {log}")
        return time.perf_counter() - began

    def metrics(self) -> list[dict[str, Any]]:
        """The metrics of every step."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def cost(self) -> dict[str, float]:
        """What training costs: FLOPs and visual tokens relative to dense, seconds, and the loss at the end."""
        steps = self.metrics()
        total = {key: sum(step[key] for step in steps) for key in ("flops", "flops_dense", "flops_selector")}
        visual = {key: sum(step[f"visual_tokens{key}"] for step in steps) for key in ("", "_entering", "_leaving")}
        return {
            "flop_ratio": total["flops"] / total["flops_dense"],
            "selector_share": total["flops_selector"] / total["flops"],
            "entering_share": visual["_entering"] / visual[""],
            "leaving_share": visual["_leaving"] / visual[""],
            "final_loss": sum(step["loss"] for step in steps[-20:]) / len(steps[-20:]),
            "steps": len(steps),
            "seconds": sum(step["step_time"] for step in steps),
        }


class Cells:
    """Answers on disk, updated after each cell. A cell is valid only for the same ``shared`` settings."""

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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_synced(self.path, (json.dumps(self.known) + "\n").encode())


def cell_name(method: PruningMethod | None) -> str:
    """The name of a method with its settings, for a cell."""
    return NONE if method is None else json.dumps(method.settings(), sort_keys=True)


def as_overrides(method: PruningMethod | None) -> tuple[str, ...]:
    """A method and its settings as ``key=value``."""
    if method is None:
        return (f"pruning.method={NONE}",)
    return tuple(f"pruning.{key}={json.dumps(value)}" for key, value in method.settings().items())


@dataclass(frozen=True)
class Asked:
    """A run, and the methods that its model answers with."""

    run: Run
    methods: tuple[PruningMethod | None, ...]


def complete(asked: Sequence[Asked], cells: Cells, *, images: int, batch_size: int, jobs: int) -> None:
    """Train all runs that are not finished and fill all missing cells, ``jobs`` runs at a time, one thread each.

    Raises:
        RuntimeError: a run failed.
    """
    wanted: dict[Run, dict[str, PruningMethod | None]] = {}
    for one in asked:
        wanted.setdefault(one.run, {}).update({cell_name(method): method for method in one.methods})
    missing = {}
    for run, methods in wanted.items():
        left = [method for name, method in methods.items() if not run.trained or cells.of(run.folder, name) is None]
        if left:
            missing[run] = left
    if not missing:
        return
    for task in {run.task.name: run.task for run in missing}.values():
        task.write()
    began, done = time.perf_counter(), 0
    with single_threaded(), ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures: dict[Future[Any], Run] = {
            pool.submit(_completed, run, left, images, batch_size): run for run, left in missing.items()
        }
        try:
            for future in as_completed(futures):
                run, (seconds, answered) = futures[future], future.result()
                for name, cell in answered.items():
                    cells.put(run.folder, name, cell)
                done += 1
                minutes = (time.perf_counter() - began) / 60
                shown = ", ".join(_shown(cell) for cell in answered.values())
                print(
                    f"{done} of {len(missing)}, {minutes:.1f} min: {run.task.name} {run.folder.name}, seed {run.seed}, "
                    f"{'trained earlier' if not seconds else f'{seconds:.0f} s'}: {shown}",
                    flush=True,
                )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _shown(cell: dict[str, Any]) -> str:
    return "-" if cell["exact_match"] is None else f"{cell['exact_match']:.1%}"


@contextmanager
def single_threaded() -> Iterator[None]:
    """Processes that start in this context use one thread each."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _completed(
    run: Run, methods: Sequence[PruningMethod | None], images: int, batch_size: int
) -> tuple[float, dict[str, dict[str, Any]]]:
    """Train a run, then answer with every method; returns the seconds of the training process and the cells."""
    seconds = run.train()
    loaded = load(str(run.folder), None, device="cpu")
    attention = backend_for(loaded.model)
    asked = run.task.questions(images)
    prompts = [([open_image(path) for path in question.images], question.turns) for question in asked]
    batches = [batch(loaded, prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
    return seconds, {cell_name(method): ask(loaded, method, batches, asked, attention) for method in methods}


def ask(
    loaded: Loaded, method: PruningMethod | None, batches: Sequence[Any], questions: Sequence[Question], attention: str
) -> dict[str, Any]:
    """Exact match, the answers that are right (``1``) and wrong (``0``), and the measured token share (cache-pruning
    methods: share of kept keys)."""
    saved = getattr(loaded.model.config, CONFIG_KEY, None) or {}
    if method is not None and learns(method) and saved.get("method") != method.settings()["method"]:
        reason = "requires learned parameters that this model does not have"
        return {"exact_match": None, "right": None, "taken_share": None, "reason": reason}
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
        "right": "".join("01"[one] for one in right),
        "taken_share": taken / sum(one.visual_tokens[0] for one in measured),
        "reason": None,
    }
