#!/usr/bin/env python
"""Benchmark the rollouts of GRPO: several sampled completions of one prompt, with one image.

    python scripts/bench_rollout.py --device cpu --geometry small [--completions 8] [--steps 16] [--json FILE]

``generate`` runs on ``completions`` rows that are all equal, as TRL repeats them, and on as many rows of the same
length that all differ, in interleaved repeats. A packed or pruned model runs one prefill for equal rows. Reports the
median seconds to the first token and for ``steps`` tokens, and their ratios, equal rows over different ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench import GEOMETRIES, build
from bench_generate import HF, make_inputs
from bench_rows import environment, synchronize
from vtprune_train import PyramidDrop, pack, prune, unprune
from vtprune_train.models import HFModule

CONFIGURATIONS = {HF: None, "packed": pack, "pyramiddrop": lambda model: prune(model, PyramidDrop())}
ROWS = ("equal", "different")


def run(
    model: HFModule, inputs: dict[str, dict[str, torch.Tensor]], repeats: int, steps: int, device: torch.device
) -> list[dict[str, Any]]:
    """Measure all configurations on the ``inputs`` of :data:`ROWS`, after one warm-up."""
    times: dict[tuple[str, str, int], list[float]] = {}
    for number in range(repeats + 1):
        for name, change in CONFIGURATIONS.items():
            if change is not None:
                change(model)
            for rows in ROWS:
                for tokens in (1, steps):
                    seconds = sampled(model, inputs[rows], tokens, device)
                    if number:
                        times.setdefault((name, rows, tokens), []).append(seconds)
            if change is not None:
                unprune(model)
    table = []
    for name in CONFIGURATIONS:
        row: dict[str, Any] = {"name": name}
        for what, tokens in (("first_token", 1), ("completion", steps)):
            equal, different = (statistics.median(times[name, rows, tokens]) for rows in ROWS)
            row |= {f"{what}_equal_s": equal, f"{what}_different_s": different, f"{what}_ratio": equal / different}
        table.append(row)
    return table


@torch.no_grad()
def sampled(model: HFModule, inputs: dict[str, torch.Tensor], tokens: int, device: torch.device) -> float:
    """Seconds that ``generate`` takes."""
    synchronize(device)
    began = time.perf_counter()
    model.generate(**inputs, do_sample=True, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0)
    synchronize(device)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--geometry", choices=[name for name in GEOMETRIES if name != "save"], default="small")
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device, geometry = torch.device(args.device), GEOMETRIES[args.geometry]
    model, anyres = build(geometry, device)
    model.eval()
    different = make_inputs(model, anyres, [geometry.samples[-1]] * args.completions)
    equal = {key: value[:1].repeat_interleave(args.completions, dim=0) for key, value in different.items()}
    length = different["input_ids"].shape[1]
    table = run(model, {"equal": equal, "different": different}, args.repeats, args.steps, device)
    print(f"{args.completions} completions of a prompt of {length} tokens; seconds, equal rows / different rows")
    for row in table:
        print(
            f"{row['name']:14}first token {row['first_token_equal_s']:.3f} / {row['first_token_different_s']:.3f} = "
            f"{row['first_token_ratio']:.3f}; {args.steps} tokens {row['completion_equal_s']:.3f} / "
            f"{row['completion_different_s']:.3f} = {row['completion_ratio']:.3f}"
        )
    if args.json is not None:
        settings = {"completions": args.completions, "prompt_tokens": length, "steps": args.steps}
        args.json.write_text(
            json.dumps({**settings, "rows": table, "environment": environment(args, device)}, indent=2)
        )


if __name__ == "__main__":
    main()
