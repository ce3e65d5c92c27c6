"""Recorded outputs of published code: PyramidDrop's decoder, and twenty-three other methods."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "fixtures" / "golden"
METHODS = GOLDEN / "methods"
SCRIPT = ROOT / "scripts" / "check_golden.py"
sys.path.insert(0, str(ROOT / "scripts"))

import check_golden  # noqa: E402

pytestmark = pytest.mark.slow

# What differs from the published code, as the pages say. A case that comes out equal belongs here no more.
DEVIATIONS = {
    "cdpruner_negated": {"kept"},
    "dart_4+4_576": {"kept"},
    "dycoke_8x16_0.7": {"kept"},
    "prumerge_advanced_61": {"kept", "values"},
    "prumerge_advanced_plus_61": {"kept", "values"},
    "prumerge_advanced_plus_training_61": {"kept", "values"},
    "visionzip_54+10_61": {"values"},
}
CASES = [(folder, path.stem) for folder in (GOLDEN, METHODS) for path in sorted(folder.glob("*.json"))]


def copied(folder: Path, name: str, to: Path) -> tuple[dict, dict]:
    """The case in another folder; returns its JSON and its tensors."""
    for suffix in ("json", "safetensors"):
        shutil.copy(folder / f"{name}.{suffix}", to)
    return json.loads((to / f"{name}.json").read_text()), load_file(to / f"{name}.safetensors")


def written(folder: Path, name: str, entries: dict, tensors: dict) -> None:
    (folder / f"{name}.json").write_text(json.dumps(entries))
    save_file(tensors, folder / f"{name}.safetensors")


def test_no_case_is_left_out():
    assert [len(list(folder.glob("*.safetensors"))) for folder in (GOLDEN, METHODS)] == [3, 72] and len(CASES) == 75
    assert set(DEVIATIONS) < {name for _, name in CASES}


@pytest.mark.parametrize(("folder", "name"), CASES, ids=[name for _, name in CASES])
def test_what_published_code_gives(folder, name):
    outcome = check_golden.run_case(folder, name)
    assert outcome.parts and outcome.passed, str(outcome)
    assert {part.name for part in outcome.differing} == DEVIATIONS.get(name, set()), str(outcome)


@pytest.mark.parametrize(
    ("folder", "last"),
    [
        (GOLDEN, "3 of 3 equal, 0 differ as documented, 0 differ, 0 cannot be read"),
        (METHODS, "65 of 72 equal, 7 differ as documented, 0 differ, 0 cannot be read"),
    ],
)
def test_the_command(folder, last):
    result = subprocess.run([sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and lines[-1] == last, result.stdout + result.stderr
    assert [line.split()[1].rstrip(":") for line in lines[:-1]] == sorted(p.stem for p in folder.glob("*.json"))


@pytest.mark.parametrize(
    "tamper", ["kept", "loss", "hidden", "gradient", "greedy_tokens", "cache_lengths", "greedy_hidden"]
)
def test_a_wrong_recording_of_pyramiddrop_is_noticed(tmp_path, tamper, capsys):
    name = "prefill_and_decode" if tamper.startswith(("greedy", "cache")) else "train_one_turn"
    case, tensors = copied(GOLDEN, name, tmp_path)
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
    written(tmp_path, name, case, tensors)
    assert check_golden.main([str(tmp_path)]) == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "tensor", "change"),
    [
        ("fastv_hf_K3_144_kv2of4", "expected.kept_0", 1),
        ("feather_24x24_kv2of4_22", "expected.kept_1", 1),
        ("sparsevlm_64_kv4of4", "expected.raters", 1),
        ("hidrop_training_two_answers", "expected.last_hidden_state", 0.01),
        ("hidrop_training_two_answers", "expected.gradient", 0.01),
        ("voco_2_pre6_kv4of4", "expected.last_hidden_state", 0.01),
        ("voco_2_pre6_kv4of4", "expected.decode_hidden", 0.01),
        ("voco_training", "expected.module_gradient", 0.01),
        ("voco_training", "expected.last_hidden_state", float("nan")),
        ("visionselector_144_0.2", "expected.kept", 1),
        ("visionselector_soft_144_0.2", "expected.values", 0.01),
        ("visionselector_soft_81_0.5", "expected.module_gradient.score_key.bias", 0.01),
        ("quecc_12x12_4", "instruction", 0.1),
        ("quecc_12x12_12", "module.downsample.weight", 1.0),
        ("quecc_6x6_2", "expected.gradient", 0.01),
        ("divprune_144_0.5", "expected.kept", 1),
        ("vtc_cls_start2_36_61", "hidden", 0.01),
        ("visionzip_40+0_61", "expected.values", 0.01),
        ("visionzip_54+10_61", "expected.kept", 1),
        ("prumerge_advanced_61", "hidden", 0.01),
        ("dualspeed_loss_40x60", "expected.loss", 0.01),
        ("dualspeed_loss_40x60", "expected.grad_head", 0.01),
    ],
)
def test_a_wrong_recording_of_another_method_is_noticed(tmp_path, name, tensor, change, capsys):
    """The tower's features and what stands before a documented deviation have to be equal in any case."""
    case, tensors = copied(METHODS, name, tmp_path)
    tensors[tensor].flatten()[0] += change
    written(tmp_path, name, case, tensors)
    assert check_golden.main([str(tmp_path)]) == 1
    assert f"FAIL    {name}" in capsys.readouterr().out


def test_another_setting_is_another_outcome(tmp_path):
    for name, settings in (
        ("voco_2_pre6_kv4of4", {"tokens": 2, "hide": "image"}),
        ("fastv_inplace_K2_288_kv4of4", {"layer": 2, "keep": 0.49}),
        ("sparsevlm_64_kv4of4", {"layers": [1, 3, 5], "budget": 64, "recycle": "sum"}),
    ):
        case, tensors = copied(METHODS, name, tmp_path)
        written(tmp_path, name, {**case, "settings": settings}, tensors)
    assert check_golden.main([str(tmp_path)]) == 1
    assert not any(check_golden.run_case(tmp_path, path.stem).passed for path in tmp_path.glob("*.json"))


def test_a_deviation_that_no_page_states_fails(tmp_path, capsys):
    name = "cdpruner_negated"
    case, tensors = copied(METHODS, name, tmp_path)
    for change in ({"documented": ""}, {"undocumented": "it negates the cosine"}):
        written(tmp_path, name, {**case, **change}, tensors)
        assert check_golden.main([str(tmp_path)]) == 1
        assert f"FAIL    {name}: kept: 32 of 32 entries differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"kind": "encoder"},
            "kind 'encoder' is not one of decoder, contract, clip, tower, merge, merging, consistency",
        ),
        ({"format": "vtprune-golden-9"}, "format 'vtprune-golden-9' is neither"),
        ({"settings": {"tokns": 2}}, "method and settings:"),
        ({"method": "vocoo"}, "method and settings:"),
        ({"layout": {"pre": 6, "visual": 144}}, "no 'post' beside pre, visual"),
    ],
)
def test_a_case_that_cannot_be_understood(tmp_path, change, words, capsys):
    name = "voco_2_pre6_kv4of4"
    case, tensors = copied(METHODS, name, tmp_path)
    written(tmp_path, name, {**case, **change}, tensors)
    assert check_golden.main([str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert f"ERROR   {name}: " in output.err and words in output.err
    assert output.out.splitlines() == ["0 of 1 equal, 0 differ as documented, 0 differ, 1 cannot be read"]


@pytest.mark.parametrize(
    ("folder", "name", "tensor"),
    [
        (GOLDEN, "train_one_turn", "labels"),
        (GOLDEN, "prefill_and_decode", "last_hidden_state"),
        (METHODS, "voco_2_pre6_kv4of4", "expected.decode_hidden"),
        (METHODS, "voco_2_pre6_kv4of4", "decode_embeds"),
        (METHODS, "voco_2_pre6_kv4of4", "module.weight"),
        (METHODS, "hidrop_training_two_answers", "expected.gradient"),
        (METHODS, "hidrop_training_two_answers", "expected.kept_0"),
        (METHODS, "cdpruner_negated", "instruction"),
        (METHODS, "quecc_6x6_2", "module.out.weight"),
        (METHODS, "visionselector_soft_81_0.5", "expected.module_gradient.score_query.weight"),
        (METHODS, "prumerge_given_attention_61", "tower_keys"),
        (METHODS, "visionzip_54+10_61", "expected.values"),
        (METHODS, "vtc_cls_start2_36_61", "pixel_values"),
        (METHODS, "dualspeed_loss_40x60", "expected.divergence"),
    ],
)
def test_a_tensor_that_is_missing(tmp_path, folder, name, tensor, capsys):
    case, tensors = copied(folder, name, tmp_path)
    del tensors[tensor]
    written(tmp_path, name, case, tensors)
    copied(METHODS, "divprune_144_0.5", tmp_path)
    assert check_golden.main([str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert f"ERROR   {name}: the safetensors file has no tensor '{tensor}'" in output.err
    assert "ok      divprune_144_0.5" in output.out, "the others are checked"


def test_files_that_are_missing_or_broken(tmp_path, capsys):
    assert check_golden.main([str(tmp_path)]) == 2
    for name in ("train_one_turn", "train_two_turns", "prefill_and_decode"):
        copied(GOLDEN, name, tmp_path)
    (tmp_path / "train_one_turn.safetensors").unlink()
    (tmp_path / "train_two_turns.json").unlink()
    (tmp_path / "prefill_and_decode.json").write_text("{")
    assert check_golden.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "train_one_turn.safetensors is missing" in error and "train_two_turns.json is missing" in error
    assert "ERROR   prefill_and_decode: Expecting property name" in error
