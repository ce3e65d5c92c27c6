"""The published decoder's recorded outputs."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "fixtures" / "golden"


SCRIPT = ROOT / "scripts" / "check_golden.py"


@pytest.fixture(scope="module")
def check():
    """The script's ``main`` in this process."""
    spec = importlib.util.spec_from_file_location("check_golden", SCRIPT)
    sys.modules["check_golden"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda folder: module.main([str(folder)])


def test_all_cases_agree():
    command = [sys.executable, str(SCRIPT), str(GOLDEN)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("ok  ") == 3


@pytest.mark.parametrize(
    "tamper", ["kept", "loss", "hidden", "gradient", "greedy_tokens", "cache_lengths", "greedy_hidden"]
)
def test_a_wrong_recording_is_noticed(tmp_path, tamper, check, capsys):
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
    assert check(tmp_path) == 1
    assert "FAIL" in capsys.readouterr().out


def test_an_empty_folder_is_an_error(tmp_path, check):
    assert check(tmp_path) == 2
