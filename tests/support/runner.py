"""Real training processes on a tiny data set: what the tests of the command line share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from PIL import Image

from tests.support.warm import WarmParent, WarmProcess

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
WARM = WarmParent()
Process = subprocess.Popen[bytes] | WarmProcess

TINY = {
    "run": {"name": "run", "seed": 3},
    "model": {
        "config": {
            "text_config": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 400,
                "max_position_embeddings": 1024,
                "initializer_range": 0.1,
            },
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 24,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 7,
            },
            "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
            "image_seq_length": 16,
        },
        "dtype": "float32",
        "train": {"projector": 1e-2, "language_model": 1e-2, "vision_tower": 1e-3},
    },
    "data": {
        "train": [{"path": "train.json", "images": "images"}],
        "eval": [{"path": "eval.json", "images": "images"}],
        "system": "",
        "max_length": 300,
        "max_tokens": 600,
        "max_bad": 0,
        "workers": 0,
    },
    "pruning": {"method": "pyramiddrop", "layers": [1, 2, 3], "keep": [0.5, 0.25, 0.125]},
    "train": {
        "global_batch_size": 6,
        "epochs": 2,
        "warmup_ratio": 0.2,
        "clip": 1.0,
        "activation_checkpointing": True,
        "save_every": 1000,
        "keep_last": 2,
    },
    "deepspeed": "configs/deepspeed/zero2.json",
}


def write_data(folder: Path, num_train: int = 20) -> None:
    """One picture, several pictures over several turns, and text alone, in turn: the last step of an epoch is short."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for split, count in (("train", num_train), ("eval", 5)):
        records = []
        for number in range(count):
            images = (1, 3, 0, 1, 2)[number % 5]
            names, turns = [], []
            for index in range(max(images, 1)):
                question = f"how bright is number {number}?"
                if images:
                    name = f"{split}-{number}-{index}.png"
                    size = (int(rng.integers(20, 80)), int(rng.integers(20, 80)), 3)
                    Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(folder / "images" / name)
                    names.append(name)
                    question = f"<image>\n{question}"
                turns += [{"from": "human", "value": question}, {"from": "gpt", "value": f"about {rng.integers(9)}"}]
            record: dict[str, Any] = {"id": f"{split}{number}", "conversations": turns}
            if names:
                record["image"] = names if len(names) > 1 else names[0]
            records.append(record)
        (folder / f"{split}.json").write_text(json.dumps(records))


class Runs:
    """Starts training in a folder of its own; ``settings`` are overrides of ``TINY``."""

    def __init__(self, folder: Path, **write: Any):
        self.folder = folder
        write_data(folder / "data", **write)
        self.config = folder / "tiny.yaml"
        self.config.write_text(yaml.safe_dump(TINY))

    def arguments(self, name: str, *settings: str, script: Path = ROOT / "train.py") -> list[str]:
        """The script and what it is given."""
        own = [f"run.name={name}", f"run.output_dir={self.folder / 'runs'}", f"data.root={self.folder / 'data'}"]
        own.append(f"data.cache_dir={self.folder / 'cache'}")
        return [str(script), "--config", str(self.config), *own, *settings]

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def run(
        self, name: str, *settings: str, expect: int = 0, timeout: float = 300, **launch: Any
    ) -> subprocess.CompletedProcess[str]:
        """Train to the end of the process and check its exit code."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = self._start(name, *settings, out=out.fileno(), err=err.fileno(), **launch)
            try:
                code = process.wait(timeout=timeout)
            except subprocess.TimeoutExpired:
                said = stacks(process.pid)
                kill(process)
                err.seek(0)
                raise AssertionError(f"{name} hangs\n{said}\n{err.read()[-3000:]}") from None
            out.seek(0)
            err.seek(0)
            done = subprocess.CompletedProcess(process.args, code, out.read(), err.read())
        assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done

    def start(self, name: str, *settings: str, **launch: Any) -> Process:
        """Start in a process group of its own; what it says goes to its log."""
        with (self.folder / f"{name}.log").open("ab") as log:
            return self._start(name, *settings, out=log.fileno(), err=log.fileno(), **launch)

    def _start(
        self,
        name: str,
        *settings: str,
        out: int,
        err: int,
        ranks: int = 1,
        launcher: str = "warm",
        script: Path = ROOT / "train.py",
        env: dict[str, str] | None = None,
    ) -> Process:
        """``launcher``: warm (forked from a parent that has imported everything), or python, torchrun, deepspeed."""
        arguments = self.arguments(name, *settings, script=script)
        environment = {**self.environment(), **(env or {})}
        if launcher == "warm":
            return WARM.start(arguments, ranks=ranks, cwd=ROOT, env=environment, out=out, err=err)
        launch = {
            "python": [sys.executable],
            "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(ranks)],
            "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", str(ranks)],
        }[launcher]
        return subprocess.Popen(
            [*launch, *arguments], cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True
        )

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def directory(self, name: str) -> Path:
        return self.folder / "runs" / name

    def metrics(self, name: str) -> list[dict[str, Any]]:
        path = self.directory(name) / "metrics.jsonl"
        return (
            [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        )

    def checkpoint(self, name: str) -> Path:
        folder = self.directory(name) / "checkpoints"
        return folder / (folder / "latest").read_text().strip()


def kill(process: Process) -> None:
    """SIGKILL to the launcher, all ranks and their workers."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def stacks(group: int) -> str:
    """Where every process of a group stands, as far as py-spy is installed and allowed to look."""
    spy = BIN / "py-spy"
    members = [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if _group_of(entry) == group]
    if not spy.is_file():
        return f"processes {members} (their stacks are shown where py-spy is installed)"
    dumps = [subprocess.run([spy, "dump", "--pid", str(pid)], capture_output=True, text=True) for pid in members]
    return "\n".join(dump.stdout or dump.stderr for dump in dumps)


def _group_of(entry: Path) -> int | None:
    try:
        return os.getpgid(int(entry.name))
    except ProcessLookupError:  # it ended meanwhile
        return None


def workers_of(rank: int) -> list[psutil.Process]:
    """The loader workers of a rank, which a server below it has forked."""
    return [worker for server in psutil.Process(rank).children() for worker in server.children()]


def wait_until(condition: Any, process: Process, seconds: float = 120) -> bool:
    """Poll until ``condition()``; false if the process ended first."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    raise TimeoutError("the condition did not come true")


def all_end(processes: list[psutil.Process], seconds: float) -> bool:
    """Whether they end in time; those that wait for a parent have ended (in a container, process 1 may fetch none)."""

    def runs(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except psutil.NoSuchProcess:
            return False

    deadline = time.monotonic() + seconds
    while any(map(runs, processes)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


VARYING = (
    "step_time",
    "data_wait",
    "data_wait_share",
    "data_wait_longest",
    "batches_ready",
    "tokens_per_second",
    "peak_memory_bytes",
    "time",
)


def assert_same_metrics(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    """Every number of every step equal, but for times."""
    strip = [[{k: v for k, v in m.items() if k not in VARYING} for m in metrics] for metrics in (one, two)]
    assert strip[0] == strip[1]


def assert_equal_bits(one: Any, two: Any, place: str = "") -> None:
    """Nested containers of tensors and numbers, equal to the last bit."""
    assert type(one) is type(two), place
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), place
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), place
        for key in one:
            assert_equal_bits(one[key], two[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), place
        for index, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_equal_bits(a, b, f"{place}[{index}]")
    elif hasattr(one, "__dict__") and not callable(one):
        assert_equal_bits(vars(one), vars(two), place)
    elif not callable(one):
        assert one == two, place


def assert_equal_checkpoints(one: Path, two: Path) -> None:
    """Weights and optimizer states of every rank, equal to the last bit."""
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*.pt"))
    assert names and names == sorted(str(path.relative_to(two)) for path in two.rglob("*.pt"))
    for name in names:
        loaded = [torch.load(folder / name, weights_only=False) for folder in (one, two)]
        for part in loaded:
            part.pop("ds_config", None)
        assert_equal_bits(loaded[0], loaded[1], name)
    exports = sorted(path.name for path in (one / "hf").glob("*.safetensors"))
    assert exports and exports == sorted(path.name for path in (two / "hf").glob("*.safetensors"))
    for name in exports:
        assert (one / "hf" / name).read_bytes() == (two / "hf" / name).read_bytes(), name
