#!/usr/bin/env python
"""Fault-injection test: break a tiny training run, restart it, and check that the result is bit-identical.

    python scripts/hammer.py --trials 200 --seed 0
    python scripts/hammer.py --seed 0 --only 37     # rerun only trial 37

Each trial draws from its own seed: ranks, ZeRO stage, saves in the background or not, loader workers, evaluation, and
one to three faults, one after the other. A fault is a kill, a stop or a full disk at a defined point, or a damaged file
between two starts. The run is then restarted until it finishes. Weights, optimizer states, ``metrics.jsonl`` and
``eval.jsonl`` must equal those of an undisturbed run; exit codes and messages must match the documentation; no
temporary files or processes may remain. Ends with a table, and with exit code 1 if a trial failed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "scripts"):
    sys.path.insert(0, str(folder))

import torch  # noqa: E402

from hammering.plans import DAMAGED, END, IN_SAVE, IN_STEP, LINES, START, Choices, draw  # noqa: E402
from hammering.trial import References, Result, run_trial  # noqa: E402
from tests.support.runner import Runs  # noqa: E402

TABLE = "hammer.md"  # marker file: the folder belongs to this script and may be deleted
COLUMNS = {"kill": "kill", "stop": "stop", "disk": "full disk"}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(1)
    out = arguments.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / TABLE).write_text("not finished\n")
    began = time.monotonic()
    background = [value == "on" for value in arguments.background]
    choices = Choices(arguments.seed, arguments.ranks, arguments.zero, background, arguments.kinds)
    numbers = arguments.only or range(arguments.trials)
    results = hammer(choices, numbers, Runs(out), out, arguments.jobs, arguments.stop)
    lines = report(results, time.monotonic() - began)
    failed = [result for result in results if result.outcome == "failed"]
    lines += [f"trial {result.trial.number}: {repeat(arguments, result.trial.number)}" for result in failed]
    (out / TABLE).write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return int(bool(failed))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="run only these trials")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--zero", type=int, nargs="+", choices=(0, 1, 2, 3), default=[0, 2, 3])
    parser.add_argument("--background", nargs="+", choices=("on", "off"), default=["on", "off"], help="saves")
    parser.add_argument("--kinds", nargs="+", choices=(*COLUMNS, "damage"), default=[*COLUMNS, "damage"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parallel trials")
    parser.add_argument("--stop", action="store_true", help="stop after the first failure")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "hammer", help="output folder (deleted first); keeps failed trials"
    )
    arguments = parser.parse_args(argv)
    if min(arguments.trials, arguments.jobs, *arguments.ranks) < 1 or min(arguments.only or [0]) < 0:
        parser.error("--trials, --jobs and --ranks must be at least 1, and --only at least 0")
    out = arguments.out
    if out.exists() and not (out.is_dir() and ((out / TABLE).is_file() or not any(out.iterdir()))):
        parser.error(f"--out: {out} would be emptied, and is not a folder of an earlier hammer: name a new one")
    return arguments


def hammer(
    choices: Choices, numbers: Sequence[int], runs: Runs, out: Path, jobs: int, stop: bool = False
) -> list[Result]:
    """Run the trials in parallel and print each result."""
    trials = [draw(choices, number) for number in numbers]
    references = References(runs, out / "references")
    results = []
    with ThreadPoolExecutor(jobs) as pool:
        try:
            kinds = {(trial.settings.ranks, trial.settings.zero): trial.settings for trial in trials}
            list(pool.map(references.make, kinds.values()))
            running = [
                pool.submit(run_trial, runs, trial, out / f"trial_{trial.number:04d}", references) for trial in trials
            ]
            for future in as_completed(running):
                results.append(future.result())
                tell(results[-1], len(results), len(trials))
                if stop and results[-1].outcome == "failed":
                    break
        finally:  # clean up running trials and their file systems
            pool.shutdown(wait=True, cancel_futures=True)
    return sorted(results, key=lambda result: result.trial.number)


def tell(result: Result, done: int, trials: int) -> None:
    settings, faults = result.trial.settings, ", then ".join(map(str, result.trial.faults))
    setting = f"{settings.ranks} rank(s), ZeRO {settings.zero}, background {'on' if settings.background else 'off'}"
    ended = f"{result.outcome} in {result.seconds:.0f} s"
    print(f"[{done}/{trials}] trial {result.trial.number}: {ended}; {setting}: {faults}")
    if result.reason:
        print("  " + result.reason.replace("\n", "\n  "))
    sys.stdout.flush()


def report(results: Sequence[Result], seconds: float) -> list[str]:
    """Tables by fault point and by damaged file, and totals."""
    cells: dict[tuple[str, str], Counter[str]] = {}
    for result in results:
        for fault in result.trial.faults:
            column = fault.what if fault.kind == "damage" else fault.kind
            outcome = "missed" if fault in result.missed else result.outcome
            cells.setdefault((fault.moment, column), Counter())[outcome] += 1
    moments = ("a step", *START, *IN_STEP, *IN_SAVE, *END)
    lines = matrix("moment", moments, COLUMNS, cells) if any(key[1] in COLUMNS for key in cells) else []
    if any(key[0] in DAMAGED for key in cells):
        hows = (*LINES, *DAMAGED["leftover"])
        lines += ["", *matrix("damaged", tuple(DAMAGED), dict(zip(hows, hows, strict=True)), cells)]
    outcomes = Counter(result.outcome for result in results)
    faults = sum(len(result.trial.faults) for result in results)
    missed = sum(len(result.missed) for result in results)
    counts = ", ".join(f"{outcomes[name]} {name}" for name in ("equal", "refused", "failed"))
    total = f"{len(results)} trials, {faults} faults ({missed} whose moment did not come) in {seconds / 60:.1f} minutes"
    return [*lines, "", f"{total}: {counts}"]


def matrix(
    title: str, rows: Sequence[str], columns: dict[str, str], cells: dict[tuple[str, str], Counter[str]]
) -> list[str]:
    """Table without empty rows and columns."""
    columns = {name: shown for name, shown in columns.items() if any((row, name) in cells for row in rows)}
    lines = [f"| {title} | {' | '.join(columns.values())} |", "|---" * (1 + len(columns)) + "|"]
    for row in rows:
        shown = [cell(cells.get((row, name), Counter())) for name in columns]
        if any(shown):
            lines.append(f"| {row} | {' | '.join(shown)} |")
    return lines


def cell(counts: Counter[str]) -> str:
    others = [f"{counts[name]} {name}" for name in ("refused", "failed", "missed") if counts[name]]
    return ", ".join([*([str(counts["equal"])] if counts["equal"] else []), *others])


def repeat(arguments: argparse.Namespace, number: int) -> str:
    """Command line that reruns a trial."""
    drawn_from = [
        option
        for name, default in (("ranks", [1, 2]), ("zero", [0, 2, 3]), ("background", ["on", "off"]))
        if (values := getattr(arguments, name)) != default
        for option in (f"--{name}", *map(str, values))
    ]
    if arguments.kinds != [*COLUMNS, "damage"]:
        drawn_from += ["--kinds", *arguments.kinds]
    return shlex.join(
        ["python", "scripts/hammer.py", "--seed", str(arguments.seed), "--only", str(number), *drawn_from]
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # raise SystemExit so that child processes are cleaned up
    sys.exit(main())
