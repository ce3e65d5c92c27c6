"""The published decoder's recorded outputs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "fixtures" / "golden"


def check(folder):
    command = [sys.executable, str(ROOT / "scripts" / "check_golden.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


def test_all_cases_agree():
    result = check(GOLDEN)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("ok  ") == 3


@pytest.mark.parametrize(
    "tamper", ["kept", "loss", "hidden", "gradient", "greedy_tokens", "cache_lengths", "greedy_hidden"]
)
def test_a_wrong_recording_is_noticed(tmp_path, tamper):
    name = "prefill_and_decode" if tamper.startswith(("greedy", "cache")) else "train_one_turn"
    for suffix in ("json", "safetensors"):
        shutil.copy(GOLDEN / f"{name}.{suffix}", tmp_path)
    case = json.loads((tmp_path / f"{name}.json").read_text())
    tensors = load_file(tmp_path / f"{name}.safetensors")
    if tamper == "kept":
        case["kept_after_stage"][0][13] -= 1
    elif tamper == "loss":
        case["loss"] += 1e-4
    elif tamper in ("greedy_tokens", "cache_lengths"):
        case[tamper][5] += 1
    elif tamper == "greedy_hidden":
        tensors["greedy_hidden"][3, 5] += 1e-4
    else:
        tensors["last_hidden_state" if tamper == "hidden" else "grad_inputs_embeds"][3, 5] += 1e-4
    (tmp_path / f"{name}.json").write_text(json.dumps(case))
    save_file(tensors, tmp_path / f"{name}.safetensors")
    result = check(tmp_path)
    assert result.returncode == 1
    assert "FAIL" in result.stdout


def test_an_empty_folder_is_an_error(tmp_path):
    assert check(tmp_path).returncode == 2
