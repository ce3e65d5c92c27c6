#!/usr/bin/env python
"""Race training loops: the same weights and samples under transformers' Trainer, TRL, LLaMA-Factory, ms-swift and the
project's loop.

    python scripts/race.py --device cpu --geometry small [--steps 3] [--repeats 1] [--json FILE] [--plot FILE]
    python scripts/race.py --device cpu --geometry tiny --only trainer_padded,trainer_pack,loop_prune

Every row trains a LLaVA-NeXT with random weights on images and conversations of mixed lengths, read from disk, with the
same number of optimizer steps. Each run is a process of its own, and the repeats are interleaved. The first step is a
warm-up and not counted (except with sorted samples). Rows whose package is missing are listed with the reason. `make
ecosystem` installs TRL; `make peers` installs LLaMA-Factory and ms-swift, into an environment of their own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402
from transformers import AutoProcessor  # noqa: E402

import bench  # noqa: E402
from bench_rows import environment  # noqa: E402
from racing import loop, peers  # noqa: E402
from racing.report import WARM_UP, draw, rows_of, table  # noqa: E402
from racing.samples import read_samples, write_checkpoint, write_samples  # noqa: E402
from racing.setup import Setup  # noqa: E402
from racing.trainers import Collator, ordered_samples  # noqa: E402

# The package that each row needs besides those of vtprune-train[train].
ROWS = {
    "trainer_padded": None,
    "trainer_length_grouped": None,
    "trl_sft": "trl",
    "llamafactory": "llamafactory",
    "ms_swift": "swift",
    "trainer_pack": None,
    "trainer_prune": None,
    "loop_dense": None,
    "loop_prune": None,
}
# Both have the lengths of LLaVA-NeXT: up to 2,900 tokens for an image.
GEOMETRIES = {
    "tiny": replace(bench.GEOMETRIES["tiny"], vision=bench.clip(32, 3, 2), samples=bench.MIXED, pinpoints=()),
    "small": bench.GEOMETRIES["small"],
}
PEERS = ROOT / ".venv-peers" / "bin" / "python"  # made by `make peers`


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    names, left_out = choose(arguments.only, arguments.peers)
    with tempfile.TemporaryDirectory(prefix="race-") as folder:
        setup = prepare(arguments, folder)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for repeat in range(arguments.repeats):
            for name in list(runs):
                result = run(name, setup, Path(folder) / f"{name}-{repeat}.json", arguments.peers)
                print(f"repeat {repeat + 1}, {name}: {sum(result['seconds']):.2f} s in all steps", flush=True)
                runs[name].append(result)
    report = {
        **environment(arguments, torch.device(arguments.device)),
        "versions": {name: version_of(name) for name in ("accelerate", "deepspeed", "trl")},
        "steps": arguments.steps,
        "global_batch": setup.global_batch,
        "micro_batch": setup.micro_batch,
        "sample_tokens": setup.lengths,
        "rows": rows_of(runs, setup),
        "left_out": left_out,
    }
    show(report)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.plot:
        draw(report, arguments.plot)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--geometry", choices=tuple(GEOMETRIES), default="small")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps, at least 2 (default: 3)")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--global_batch", type=int, default=8, help="samples in an optimizer step (default: 8)")
    parser.add_argument("--micro_batch", type=int, default=4, help="samples in a micro-batch (default: 4)")
    parser.add_argument(
        "--peers",
        type=Path,
        default=PEERS,
        help="Python of the environment with LLaMA-Factory and ms-swift (default: that of `make peers`)",
    )
    parser.add_argument("--only", default=",".join(ROWS), help=f"rows, separated by commas: {', '.join(ROWS)}")
    parser.add_argument("--json", type=Path, help="also write results to this JSON file")
    parser.add_argument("--plot", type=Path, help="also draw speed and memory to this file")
    arguments = parser.parse_args(argv)
    chosen = arguments.only.split(",")
    for name in chosen:
        if name not in ROWS:
            parser.error(f"--only: unknown row {name!r}; rows are {', '.join(ROWS)}")
    arguments.only = [name for name in ROWS if name in chosen]
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps must be at least {WARM_UP + 1}: the first step is a warm-up")
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    if arguments.micro_batch < 1 or arguments.global_batch < 1 or arguments.global_batch % arguments.micro_batch:
        parser.error("--global_batch must be a multiple of --micro_batch, and both at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device")
    return arguments


def choose(names: Sequence[str], peers_python: Path = PEERS) -> tuple[list[str], dict[str, str]]:
    """The rows that can run, and the reason for each one that cannot."""
    left_out = {}
    for name in names:
        package = ROWS[name]
        if package and not has(package, peers_python if name in peers.RUN else None):
            left_out[name] = (
                f"the package {package} is installed neither here nor in {peers_python} (make peers)"
                if name in peers.RUN
                else f"the package {package} is not installed (make ecosystem)"
            )
    return [name for name in names if name not in left_out], left_out


def has(package: str, other_python: Path | None) -> bool:
    """Whether a package is installed here, or in the environment of another interpreter."""
    if importlib.util.find_spec(package) is not None:
        return True
    if other_python is None or not other_python.is_file():
        return False
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([str(other_python), "-c", look]).returncode == 0


def prepare(arguments: argparse.Namespace, folder: str) -> Setup:
    """Write the checkpoint and the samples that all rows read."""
    setup = Setup(
        folder=folder,
        device=arguments.device,
        steps=arguments.steps,
        micro_batch=arguments.micro_batch,
        global_batch=arguments.global_batch,
    )
    geometry = GEOMETRIES[arguments.geometry]
    write_checkpoint(geometry, setup.checkpoint)
    write_samples(geometry, setup.num_samples, setup.data)
    collate = Collator(AutoProcessor.from_pretrained(setup.checkpoint))
    for row in read_samples(setup.data):
        collate([row])
    setup = replace(setup, lengths=collate.tokens)
    peers.write_conversations(ordered_samples(setup), setup.data)
    setup.write()
    return setup


def run(name: str, setup: Setup, out: Path, peers_python: Path = PEERS) -> dict[str, Any]:
    """Run a row in a process of its own and return what it measured.

    Raises:
        RuntimeError: the process failed.
    """
    paths = [str(ROOT), str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
    extra: dict[str, str] = {}
    if name.startswith("loop_"):
        command, extra = loop.command(name, setup, out)
    elif name in peers.RUN:
        here = importlib.util.find_spec(str(ROWS[name])) is not None
        command = [sys.executable if here else str(peers_python), "-m", "racing.peers", name, setup.folder, str(out)]
        paths.append(str(ROOT / "tests" / "support" / "cpu_torchvision"))  # no effect with a CUDA build of PyTorch
        extra = {"DISABLE_VERSION_CHECK": "1"}  # LLaMA-Factory declares transformers<=5.6
    else:
        command = [sys.executable, "-m", "racing.trainers", name, setup.folder, str(out)]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", **extra}
    if setup.device == "cpu":
        variables["DS_ACCELERATOR"] = "cpu"
    # torchrun and DeepSpeed would use one thread; all rows get the same number.
    variables["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    load = os.getloadavg()[0]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if done.returncode or not out.is_file():
        raise RuntimeError(
            f"{name} ended with exit code {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return {**json.loads(out.read_text()), "load_average": load}


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def show(report: dict[str, Any]) -> None:
    print(f"\n{report['device']}, torch {report['torch']}, transformers {report['transformers']}")
    print(
        f"geometry {report['geometry']}, {report['steps']} steps of {report['global_batch']} samples in micro-batches "
        f"of {report['micro_batch']}, {report['repeats']} repeats"
    )
    print(f"tokens of the samples: {report['sample_tokens']}\n")
    print("\n".join(table(report)))
    print()
    for row in report["rows"]:
        print(f"{row['name']}: {json.dumps(row['settings'])}")
    for name, reason in report["left_out"].items():
        print(f"{name}: left out, {reason}")


if __name__ == "__main__":
    sys.exit(main())
