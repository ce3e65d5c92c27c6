#!/usr/bin/env python
"""Measure the memory of each rank under ZeRO-3, with sharded and full model construction, during startup, training,
saving, resume and export, and compare the losses.

    python scripts/measure_sharded.py [--ranks 2] [--layers 23] [--json FILE]

A randomly initialized model is saved as a bfloat16 checkpoint first. Projector and tower are trained in float32, so
that weights dominate the memory. Measured is the private memory of a process (RssAnon, sampled every 2 ms, without
mapped files) relative to before model construction, and on a GPU ``max_memory_allocated``. Two ranks with 23 layers
(1.1 GB of weights) need about 6 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ZERO3 = (
    "deepspeed={zero_optimization: {stage: 3, stage3_param_persistence_threshold: 1000, reduce_bucket_size: 5000000, "
    "stage3_prefetch_bucket_size: 5000000, stage3_max_live_parameters: 20000000, stage3_max_reuse_distance: 20000000}}"
)
PHASES = ("start", "steps", "save", "resume", "save with export", "vtprune export")


def own_memory() -> int:
    """Private memory of this process in bytes."""
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0])


class Peaks:
    """Peak memory per phase, relative to the memory at construction."""

    def __init__(self) -> None:
        self.start, self.phase, self.highest = own_memory(), "", {}  # type: ignore[var-annotated]
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            if phase := self.phase:
                self.highest[phase] = max(self.highest.get(phase, 0), own_memory() - self.start)
            time.sleep(0.002)

    def begin(self, phase: str) -> None:
        import torch

        if torch.cuda.is_available():
            if self.phase:
                key = f"{self.phase} (GPU)"
                self.highest[key] = max(self.highest.get(key, 0), torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        self.phase = phase


def child(out: Path, kind: str, arguments: list[str]) -> int:
    """Run one training rank and record its memory."""
    import vtprune_train.training.loop.run as run
    from vtprune_train.cli import train_main
    from vtprune_train.models.io.placement import WHOLE
    from vtprune_train.training.checkpoint.folder import CheckpointFolder

    peaks: list[Peaks] = []
    build, save, wait = run.build_parts, CheckpointFolder.save, CheckpointFolder.wait
    first, saving = ("resume", "save with export") if "train.export=last" in arguments else ("start", "save")

    def measured_build(*args: Any) -> Any:
        peaks.append(Peaks())
        peaks[0].begin(first)
        return build(*args)

    def measured_save(folder: Any, *args: Any) -> None:
        peaks[0].begin(saving)
        save(folder, *args)
        wait(folder)
        peaks[0].begin("steps")

    def on_fit(trainer: Any) -> int:
        peaks[0].begin("steps")
        return fit(trainer)

    def build_whole(config: Any, settings: Any) -> Any:
        return WHOLE

    fit = run.Trainer.fit
    replaced: list[tuple[Any, str, Any]] = [(run.Trainer, "fit", on_fit), (run, "build_parts", measured_build)]
    replaced.append((CheckpointFolder, "save", measured_save))
    if kind == "whole":
        replaced.append((run, "placement_for", build_whole))
    for holder, name, function in replaced:
        setattr(holder, name, function)
    sys.argv = ["train.py", *arguments]
    code = train_main()
    peaks[0].begin("")
    rank = os.environ["RANK"]
    (out / f"{kind}-{first}-{rank}.json").write_text(json.dumps(peaks[0].highest))
    return code


def export_child(out: Path, kind: str, checkpoint: str) -> int:
    """Run ``vtprune export`` and record its memory."""
    import vtprune_train.training.engine.reshard  # noqa: F401 (import first so that it is not counted)
    from vtprune_train.cli import main

    peaks = Peaks()
    peaks.begin("vtprune export")
    code = main(["export", "--model", checkpoint, "--out", str(out / f"{kind}-hf")])
    time.sleep(0.01)
    (out / f"{kind}-export-0.json").write_text(json.dumps(peaks.highest))
    return code


def make_checkpoint(runs: Any, folder: Path, layers: int) -> None:
    """Save a large randomly initialized model."""
    import torch

    from tests.support.runner import TINY
    from vtprune_train.config.load import load_config
    from vtprune_train.training.loop.parts import build_parts

    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": layers, "initializer_range": 0.02}
    TINY["model"]["config"]["text_config"].update(sizes)  # type: ignore[index]
    import yaml

    runs.config.write_text(yaml.safe_dump(TINY))
    settings = runs.arguments("made", "model.dtype=bfloat16")[3:]
    config = load_config(str(runs.config), settings)
    config.run_dir.mkdir(parents=True)
    parts = build_parts(config)
    print(f"{sum(p.numel() for p in parts.model.parameters()) / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    parts.model.save_pretrained(folder)
    parts.processor.save_pretrained(folder)


def launch(ranks: int, *arguments: str) -> None:
    """Start this script on some ranks."""
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", str(ranks)]
    command = [*(torchrun if ranks else [sys.executable]), __file__, *arguments]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # return freed memory to the OS immediately
    with tempfile.TemporaryFile("w+") as output:
        if subprocess.run(command, stdout=output, stderr=output, cwd=ROOT, env=environment).returncode:
            output.seek(0)
            raise SystemExit(output.read()[-5000:])


def measure(ranks: int, layers: int, folder: Path) -> dict[str, Any]:
    """Peaks in bytes by kind, phase and rank, and the losses by kind."""
    from tests.support.runner import Runs

    runs = Runs(folder)
    make_checkpoint(runs, folder / "checkpoint", layers)
    results: dict[str, Any] = {}
    for kind in ("sharded", "whole"):
        model = ("model.config=null", f"model.path={folder / 'checkpoint'}", "pruning.layers=[5, 10, 15]")
        train = "model.train={projector: 1e-3, vision_tower: 1e-3}"
        steps = (
            train,
            "data.eval=[]",
            "train.max_steps=3",
            "train.save_every=100",
            "train.global_batch_size=2",
            "data.workers=0",
        )
        settings = (ZERO3, *model, *steps)
        arguments = runs.arguments(kind, *settings)[1:]
        launch(ranks, "--child", str(folder), kind, *arguments, "run.stop_after=2", "train.export=never")
        launch(0, "--export-child", str(folder), kind, str(runs.checkpoint(kind)))
        launch(ranks, "--child", str(folder), kind, *arguments, "train.export=last")
        peaks: dict[str, list[int]] = {}
        for path in sorted(folder.glob(f"{kind}-*.json")):
            for phase, value in json.loads(path.read_text()).items():
                at = int(path.stem.rpartition("-")[2])
                values = peaks.setdefault(phase, [0] * ranks)
                values[at] = max(values[at], value)
        results[kind] = {"peaks": peaks, "losses": [m["loss"] for m in runs.metrics(kind)]}
        subprocess.run(["rm", "-rf", str(runs.directory(kind))], check=True)
    return results


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        return child(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    if sys.argv[1:2] == ["--export-child"]:
        return export_child(Path(sys.argv[2]), sys.argv[3], sys.argv[4])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=23)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(arguments.ranks, arguments.layers, Path(folder))
    print("private memory per rank in GB, relative to before building the model")
    for phase in dict.fromkeys([*PHASES, *results["sharded"]["peaks"]]):
        columns = [
            " / ".join(f"{value / 1e9:.2f}" for value in results[kind]["peaks"].get(phase, []) if value)
            for kind in ("sharded", "whole")
        ]
        print(f"{phase:20} {columns[0]:>16} {columns[1]:>16}")
    print(
        "losses",
        results["sharded"]["losses"],
        "equal" if results["sharded"]["losses"] == results["whole"]["losses"] else "DIFFER",
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results))
    return 0 if results["sharded"]["losses"] == results["whole"]["losses"] else 1


if __name__ == "__main__":
    sys.exit(main())
