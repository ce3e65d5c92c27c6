#!/usr/bin/env python
"""Run all GPU checks and benchmarks (under seven minutes).

    python scripts/gpu_check.py [--out runs/gpu_check] [--minutes 6.7] [--parts env,peaks,...]
    python scripts/gpu_check.py --device cpu --geometry tiny    # the same code at sizes that a CPU can run

Results are written to ``gpu_check.json`` as they are measured; ``goals`` lists which targets were met. Parts run in the
given order, each with a time limit; parts that do not fit are skipped. Failures are recorded under ``failed`` and the
exit code is 1. Needs no network; DeepSpeed and datasets only for the parts ``train`` and ``train_large``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import site
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # suppress log lines in the output
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

from gpu_checks import loop, machine, numerics, speed
from gpu_checks.common import Check, Report
from gpu_checks.goals import judge_all, print_goals


@dataclass(frozen=True)
class Part:
    """A part of the check; ``seconds`` is its expected duration on an H100."""

    run: Callable[[Check], None]
    seconds: float


PARTS = {
    "env": Part(machine.env, 5),
    "peaks": Part(machine.peaks, 12),
    "attention": Part(numerics.attention, 15),
    "tiny": Part(numerics.tiny, 40),
    "decoder": Part(speed.decoder, 25),
    "seven": Part(speed.seven, 70),
    "compile": Part(speed.compile_, 75),
    "head": Part(speed.head, 10),
    "methods": Part(numerics.methods, 25),
    "generate": Part(numerics.generate, 15),
    "train": Part(loop.train, 75),
    "profile": Part(speed.profile, 20),
    "fp8": Part(speed.fp8, 60),
    "liger": Part(speed.liger, 40),
    "fa4": Part(speed.fa4, 45),
    "train_large": Part(loop.train_large, 80),
}


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise ``TimeoutError`` in the block after ``seconds``, once control is back in Python."""

    def too_late(*_: object) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def run_part(name: str, check: Check, left: float) -> None:
    """Run one part with ``left`` seconds remaining; record why it was skipped or failed."""
    part, report = PARTS[name], check.report
    if left < 0.6 * part.seconds:
        report.put("left_out", **{name: f"{left:.0f} s left, {part.seconds:.0f} s expected"})
        return
    began = time.time()
    try:
        with deadline(min(left, 2.5 * part.seconds) if check.on_cuda else left):
            part.run(check)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        report.put("failed", **{name: {"reason": reason, "traceback": traceback.format_exc()[-3000:]}})
    report.put("seconds", **{name: round(time.time() - began, 1)})
    check.free()


def main() -> int:
    began = time.time()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu_check")))
    parser.add_argument("--minutes", type=float, default=6.7, help="total time limit in minutes")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, in execution order")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--geometry", choices=("7b", "tiny"), default="7b")
    parser.add_argument("--attention", help="attention backend for timed steps (default: varlen_torch on GPUs)")
    arguments = parser.parse_args()
    names = arguments.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--parts: unknown part {unknown[0]!r}; use {', '.join(PARTS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device; use --device cpu --geometry tiny")
    for folder in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        site.addsitedir(folder)  # process .pth files of packages installed there (FlashAttention 4 needs this)
    device = torch.device(arguments.device)
    attention = arguments.attention or ("varlen_torch" if device.type == "cuda" else "varlen_sdpa")
    check = Check(Report(arguments.out), arguments.out, device, arguments.geometry, attention)
    check.report.put("run", device=device.type, geometry=arguments.geometry, attention=attention, parts=names)
    for name in names:
        run_part(name, check, began + 60 * arguments.minutes - time.time())
    goals = judge_all(check.report.values)
    check.report.put("goals", table=goals)
    print_goals(goals)
    print(json.dumps(check.report.values.get("seconds", {})))
    return 1 if "failed" in check.report.values else 0


if __name__ == "__main__":
    sys.exit(main())
