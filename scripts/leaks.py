#!/usr/bin/env python
"""Check a long run for leaks of memory, file descriptors, threads and shared memory.

    python scripts/leaks.py [--steps 5000] [--ranks 2] [--workers 2] [--out runs/leaks]

Trains a tiny LLaVA-NeXT under torchrun, with a background save every 100 steps and an evaluation every 500, and samples
every process of the run. Writes ``samples.csv``, ``leaks.md`` (first and last quarter, slopes) and ``leaks.png`` to the
folder. The exit code is 1 if the run fails or something grows.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.runner import Runs  # noqa: E402

MEMORY = ("rss", "pss", "uss", "shared_pages")
COUNTS = ("batches_mapped", "shared_segments", "descriptors", "threads", "children")
# Quantities that determine the result. Copy-on-write after a fork moves pages between a rank and its workers, so a
# process's PSS and USS change without a leak; the total PSS does not.
DECIDING = {"whole run": ("pss",), "": ("rss", "shared_pages", *COUNTS)}
MOST_GROWTH = 0.01  # allowed relative growth of the median from first to last quarter
LEAST_BYTES = 2**20  # memory growth below this is noise
# Share of steps excluded as warm-up: caches and save buffers fill, and the first full garbage collection (after about
# 800 steps) triggers copy-on-write of pages that a rank shares with its workers.
WARM_UP = 0.2


@dataclass(frozen=True)
class Sample:
    """One process at one ``moment`` (seconds). Memory in bytes: RSS, PSS, USS and resident pages of shared memory.
    ``batches_mapped`` is the number of mapped worker batches, ``shared_segments`` of mapped /dev/shm and System V
    segments."""

    step: int
    moment: float
    process: str
    pid: int
    rss: int
    pss: int
    uss: int
    shared_pages: int
    batches_mapped: int
    shared_segments: int
    descriptors: int
    threads: int
    children: int


class Trend(NamedTuple):
    """A quantity of one process: medians of the first and last quarter of the samples, and the least-squares slope."""

    process: str
    quantity: str
    first: float
    last: float
    per_1000_steps: float

    @property
    def grows(self) -> bool:
        if self.quantity not in DECIDING.get(self.process, DECIDING[""]):
            return False
        least = LEAST_BYTES if self.quantity in MEMORY else 0.5
        return self.last - self.first > max(least, MOST_GROWTH * self.first)


def rank_of(process: psutil.Process) -> str | None:
    return process.environ().get("RANK")


def processes_of(launcher: int) -> dict[str, psutil.Process]:
    """The run's processes by name: launcher, ranks, each rank's loader workers and the server that forks them."""
    found = {"launcher": psutil.Process(launcher)}
    for process in found["launcher"].children():
        if (rank := rank_of(process)) is None:
            continue
        found[f"rank {rank}"] = process
        for server in process.children():
            for worker in server.children():
                found[f"rank {rank} server"], found[f"rank {rank} worker {worker.pid}"] = server, worker
    return found


def sample(name: str, process: psutil.Process, step: int, moment: float) -> Sample:
    with process.oneshot():
        memory = process.memory_full_info()
        folder = Path("/proc") / str(process.pid)
        maps = (folder / "maps").read_text()
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        if "RssShmem" not in status:
            raise psutil.ZombieProcess(process.pid)
        return Sample(
            step=step,
            moment=round(moment, 2),
            process=name,
            pid=process.pid,
            rss=memory.rss,
            pss=memory.pss,
            uss=memory.uss,
            shared_pages=1024 * int(status["RssShmem"].split()[0]),
            batches_mapped=maps.count("memfd:vtprune-batch"),
            shared_segments=maps.count("/dev/shm/") + maps.count("/SYSV"),
            descriptors=process.num_fds(),
            threads=process.num_threads(),
            children=len(process.children()),
        )


def last_step(metrics: Path) -> int:
    """Step of the last complete line."""
    if not metrics.is_file():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 8192))
        lines = file.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if lines else 0


def watch(run: Any, metrics: Path, interval: float, out: Path) -> list[Sample]:
    """Sample until the run ends and write each sample to ``out`` immediately."""
    samples: list[Sample] = []
    began = time.monotonic()
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Sample.__dataclass_fields__))
        writer.writeheader()
        while run.poll() is None:
            time.sleep(interval)
            step, moment = last_step(metrics), time.monotonic() - began
            if not step:
                continue
            try:
                found = list(processes_of(run.pid).items())
            except psutil.NoSuchProcess:  # the run has just ended
                continue
            for name, process in found:
                try:
                    samples.append(sample(name, process, step, moment))
                except (
                    psutil.NoSuchProcess,
                    FileNotFoundError,
                    ProcessLookupError,
                ):  # an evaluation worker that exited
                    continue
                writer.writerow(asdict(samples[-1]))
            file.flush()
    return samples


def trends_of(samples: Sequence[Sample]) -> list[Trend]:
    """Trends of the whole run and of processes that existed throughout (not evaluation workers). Warm-up and last-step
    samples are excluded."""
    end = samples[-1].step
    by_process: dict[str, list[Sample]] = defaultdict(list)
    whole: Counter[tuple[int, float]] = Counter()
    for one in samples:
        if WARM_UP * end <= one.step < end:
            by_process[one.process].append(one)
            whole[one.step, one.moment] += one.pss
    longest = max(len(series) for series in by_process.values())
    trends = [trend("whole run", "pss", [step for step, _ in whole], list(whole.values()))]
    for name, series in by_process.items():
        if len(series) >= 0.9 * longest:
            steps = [one.step for one in series]
            for quantity in (*MEMORY, *COUNTS):
                trends.append(trend(name, quantity, steps, [getattr(one, quantity) for one in series]))
    return trends


def trend(process: str, quantity: str, steps: Sequence[int], values: Sequence[float]) -> Trend:
    quarter = max(1, len(values) // 4)
    first, last = float(np.median(values[:quarter])), float(np.median(values[-quarter:]))
    return Trend(process, quantity, first, last, 1000 * float(np.polyfit(steps, values, 1)[0]))


def table(trends: Sequence[Trend]) -> list[str]:
    """One row per process, one column per quantity: medians of first and last quarter, and the slope per 1,000
    steps."""
    quantities = {**dict.fromkeys(MEMORY, " (MiB)"), **dict.fromkeys(COUNTS, "")}
    titles = [f"{name.replace('_', ' ')}{unit}" for name, unit in quantities.items()]
    lines = [f"| process | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    cells = {(one.process, one.quantity): cell(one) for one in trends}
    for process in dict.fromkeys(one.process for one in trends):
        lines.append(f"| {process} | {' | '.join(cells.get((process, name), '') for name in quantities)} |")
    return lines


def cell(trend: Trend) -> str:
    scale = 2**20 if trend.quantity in MEMORY else 1
    first, last, slope = (number / scale for number in (trend.first, trend.last, trend.per_1000_steps))
    mark = ", grows" if trend.grows else ""
    return f"{first:.4g} → {last:.4g} ({slope:+.2f}{mark})"


def draw(samples: Sequence[Sample], names: Sequence[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    quantities = {"uss": "USS (MiB)", "rss": "resident (MiB)", "descriptors": "descriptors", "threads": "threads"}
    figure, axes = plt.subplots(len(quantities), 1, sharex=True, figsize=(9, 11), layout="constrained")
    for axis, (quantity, label) in zip(axes, quantities.items(), strict=True):
        scale = 2**20 if quantity in MEMORY else 1
        for name in names:
            series = [(one.step, getattr(one, quantity) / scale) for one in samples if one.process == name]
            axis.plot(*zip(*series, strict=True), linewidth=1, label=name)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small", ncols=2)
    axes[-1].set_xlabel("global step")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="loader workers of each rank")
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between samples")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "leaks", help="output folder; must not exist")
    arguments = parser.parse_args(argv)
    out, steps = arguments.out.resolve(), arguments.steps
    if min(steps, arguments.ranks) < 1 or arguments.workers < 0 or arguments.interval <= 0:
        parser.error("--steps and --ranks must be at least 1, --workers at least 0 and --interval above 0")
    if out.exists():
        parser.error(f"--out: {out} exists; name a new folder, or remove it")
    out.mkdir(parents=True)
    runs = Runs(out, num_train=60)
    settings = (
        f"train.max_steps={steps}", f"train.epochs={steps}", f"data.workers={arguments.workers}",
        "train.save_every=100", "train.eval_every=500", "model.train={projector: 1.0e-4, language_model: 1.0e-4}",
    )  # fmt: skip
    run = runs.start("run", *settings, ranks=arguments.ranks, launcher="torchrun")
    try:
        samples = watch(run, runs.directory("run") / "metrics.jsonl", arguments.interval, out / "samples.csv")
    finally:
        if run.poll() is None:
            os.kill(run.pid, signal.SIGTERM)  # torchrun terminates the ranks, which run in separate process groups
            run.wait(timeout=120)
    if run.returncode:
        print(f"the run ended with exit code {run.returncode}; see {out / 'run.log'}", file=sys.stderr)
        return 1
    if not any(WARM_UP * steps <= one.step < steps for one in samples):
        print("no sample was taken between the warm-up and the end; raise --steps or lower --interval", file=sys.stderr)
        return 1
    trends = trends_of(samples)
    lines = table(trends)
    growing = sorted({f"{trend.process}: {trend.quantity}" for trend in trends if trend.grows})
    verdict = f"grows: {', '.join(growing)}" if growing else "no growth detected"
    lines += ["", f"{steps} steps, {arguments.ranks} rank(s), {arguments.workers} workers each: {verdict}"]
    (out / "leaks.md").write_text("\n".join(lines) + "\n")
    draw(samples, sorted({trend.process for trend in trends}), out / "leaks.png")
    print("\n".join(lines))
    return int(bool(growing))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that child processes are ended
    sys.exit(main())
