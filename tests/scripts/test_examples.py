"""The scripts in ``examples/`` run as their first lines say, in an empty folder and without network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def run(name, tmp_path, *arguments, launcher=(sys.executable,)):
    settings = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **settings}
    command = [*launcher, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_prune_and_generate(tmp_path):
    out = run("prune_and_generate.py", tmp_path, "--max_new_tokens", "4")
    [counts] = re.findall(r"visual tokens by stage: \[(.*)\]", out)
    counts = [int(count) for count in counts.split(", ")]
    assert counts == [counts[0], counts[0] // 2, counts[0] // 4, counts[0] // 8]
    assert "dense:" in out and "pruned:" in out


def test_finetune_with_trainer(tmp_path):
    out = run("finetune_with_trainer.py", tmp_path, "--steps", "12", "--out", "trained")
    losses = [float(loss) for loss in re.findall(r"'loss': '?([0-9.]+)", out)]
    assert len(losses) >= 5 and losses[-1] < losses[0]
    assert '"pruning"' in (tmp_path / "trained" / "config.json").read_text()


def test_write_a_method(tmp_path):
    out = run("write_a_method.py", tmp_path)
    kept = [line.count(",") + 1 for line in out.splitlines() if line.startswith("image ")]
    assert len(kept) == 2 and all(count > 1 for count in kept)
    assert "the loaded model gives the same logits: True" in out


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("trainer_*.py")))
def test_trainers(tmp_path, name):
    if name.startswith("trainer_trl"):
        pytest.importorskip("trl", reason="TRL is not installed (make ecosystem)")
    out = run(name, tmp_path)
    losses = [float(loss) for loss in re.findall(r"'loss': '?(-?[0-9.e-]+)", out)]
    assert len(losses) >= 2
    if name.endswith(("transformers.py", "sft.py", "dpo.py", "kto.py")):
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_loop_with_accelerate(tmp_path, ranks):
    torchrun = (str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", str(ranks))
    out = run("loop_accelerate.py", tmp_path, launcher=torchrun if ranks > 1 else (sys.executable,))
    losses = [float(loss) for loss in re.findall(r"last loss ([0-9.]+)", out)]
    assert len(losses) == 3 and losses[-1] < losses[0]
