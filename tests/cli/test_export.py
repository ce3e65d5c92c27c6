"""``vtprune export``: what is written opens in plain transformers, in training and in ``vtprune generate``."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from tests.support.checkpoints import TEMPLATE, same_state, save_folder, save_images, save_run, talkative
from tests.support.families import family_model, family_processor
from tests.support.helpers import tiny_model, tiny_processor
from vtprune_train.cli import main
from vtprune_train.data.chat import TEMPLATES, Template, Turn
from vtprune_train.evaluation.answering import load, prompt_text
from vtprune_train.models import families
from vtprune_train.models.families import family_of, trained_family
from vtprune_train.models.families.base import Lacks
from vtprune_train.models.io.build import _load_projector
from vtprune_train.models.patch import saved_method

pytestmark = pytest.mark.slow

QUESTION = "what is shown on the left ?"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run"))


def export(run_folder, out, *options, expect=0):
    assert main(["export", "--model", str(run_folder), "--out", str(out), *options]) == expect


def said(capsys, *options):
    capsys.readouterr()
    assert main(["generate", "--prompt", QUESTION, "--max_new_tokens", "10", *map(str, options)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("options", [[], ["--max_shard_size", "20KB"], ["--keep_names"]], ids=str)
def test_plain_transformers_opens_it(run_folder, tmp_path, dtype, options):
    """Weights and dense logits are those of the model, cast."""
    out = tmp_path / "export"
    export(run_folder, out, "--dtype", dtype, *options)
    shards = len(list(out.glob("*.safetensors")))
    assert (shards > 3) == ("20KB" in options) and (shards > 1) == (out / "model.safetensors.index.json").exists()
    kind = getattr(torch, dtype)
    opened, info = LlavaNextForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and opened.dtype == kind
    same_state(talkative(), opened, kind)
    source = run_folder / "checkpoints" / "step_00000008" / "hf"
    original = LlavaNextForConditionalGeneration.from_pretrained(source, dtype=kind)
    processor = AutoProcessor.from_pretrained(out)
    inputs = processor(images=Image.new("RGB", (70, 40), "red"), text=f"<image>\n{QUESTION}", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        assert torch.equal(opened(**inputs).logits, original(**inputs).logits)
    assert saved_method(opened).settings() == {**saved_method(opened).settings(), "layers": [2, 4], "keep": [0.5, 0.25]}


def test_names_are_those_of_published_checkpoints_unless_kept(run_folder, tmp_path):
    export(run_folder, tmp_path / "published")
    export(run_folder, tmp_path / "kept", "--keep_names")
    first = {}
    for name in ("published", "kept"):
        with safe_open(str(tmp_path / name / "model.safetensors"), "pt") as file:
            first[name] = sorted(file.keys())[0]
    assert first == {"published": "image_newline", "kept": "lm_head.weight"}


def test_generate_answers_the_same_from_it(capsys, run_folder, tmp_path):
    [picture] = save_images(tmp_path / "pictures", 1)
    export(run_folder, tmp_path / "export", "--dtype", "float32")
    answers = {said(capsys, "--model", path, "--image", picture) for path in (run_folder, tmp_path / "export")}
    assert len(answers) == 1 and answers != {"\n"}


@pytest.mark.parametrize(("template", "position"), [(TEMPLATE, "as_written"), ("vicuna_v1", "first")])
def test_it_carries_the_template_of_training(tmp_path, template, position):
    run = save_run(tmp_path / "run", template=template, image_position=position)
    export(run, tmp_path / "export")
    turns = [Turn("user", "here <image> ?"), Turn("assistant", "yes"), Turn("user", "and ?")]
    expected = prompt_text(load(str(run)), 1, turns)
    loaded = load(str(tmp_path / "export"))
    assert prompt_text(loaded, 1, turns) == expected
    assert ("<image>\nhere" in expected) == (position == "first")
    known = TEMPLATES[template] if isinstance(template, str) else Template(**template)
    assert expected.endswith(known.assistant)


def test_generation_stops_where_training_ended_answers(tmp_path):
    run = save_run(tmp_path / "run", template={**TEMPLATE, "answer": " {text} ."})
    export(run, tmp_path / "export")
    stop = tiny_processor().tokenizer.convert_tokens_to_ids(".")
    assert json.loads((tmp_path / "export" / "generation_config.json").read_text())["eos_token_id"] == [2, stop]


@pytest.mark.parametrize("options", [[], ["--keep_names"]], ids=["published names", "kept names"])
def test_the_projector_is_what_training_reads(run_folder, tmp_path, options):
    export(run_folder, tmp_path / "projector", "--part", "projector", "--dtype", "float32", *options)
    with safe_open(str(tmp_path / "projector" / "model.safetensors"), "pt") as file:
        names = [name.removeprefix("model.") for name in file.keys()]  # noqa: SIM118 (no mapping)
    assert all(name.startswith(("multi_modal_projector.", "image_newline")) for name in names) and len(names) == 5
    other = tiny_model(seed=9)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    loop = family_of(other).loop
    assert loop is not None
    _load_projector(other, loop, str(tmp_path / "projector"))
    own = talkative().state_dict()
    for name, value in other.state_dict().items():
        taken = name.removeprefix("model.") in names
        assert torch.equal(value, own[name] if taken else before[name]), name


def test_a_real_process_exports(run_folder, tmp_path):
    command = [sys.executable, "-m", "vtprune_train.cli", "export", "--model", str(run_folder), "--out", "made/export"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert load(str(tmp_path / "made" / "export")).model.dtype == torch.bfloat16
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["export"]


def test_a_folder_is_replaced_only_when_asked(capsys, run_folder, tmp_path):
    out = tmp_path / "export"
    export(run_folder, out)
    (out / "old.safetensors").write_text("")
    export(run_folder, out, expect=2)
    assert "is not empty; use another folder, or --force to replace the export in it" in capsys.readouterr().err
    assert (out / "old.safetensors").exists()
    export(run_folder, out, "--force")
    assert not (out / "old.safetensors").exists() and (out / "model.safetensors").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("dear")
    export(run_folder, tmp_path / "mine", "--force", expect=2)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "dear"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "mine"]


@pytest.mark.parametrize("inside", [".", "checkpoints", "checkpoints/step_00000008/hf"])
def test_the_model_itself_is_never_replaced(capsys, tmp_path, inside):
    run = save_run(tmp_path / "run")
    export(run, run / inside, "--force", expect=2)
    assert "contains the model to export" in capsys.readouterr().err
    load(str(run))


def test_damaged_weights_are_not_exported(capsys, tmp_path):
    run_folder = save_run(tmp_path)
    checkpoint = run_folder / "checkpoints" / "step_00000008"
    (checkpoint / "trainer.json").unlink()  # nothing that an export needs
    export(run_folder, tmp_path / "whole")
    weights = checkpoint / "hf" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    export(run_folder, tmp_path / "damaged", expect=2)
    assert "hf/model.safetensors does not have the recorded SHA-256" in capsys.readouterr().err
    assert not (tmp_path / "damaged").exists()


def test_a_failed_export_leaves_what_was_there(run_folder, tmp_path, monkeypatch):
    out = tmp_path / "export"
    export(run_folder, out)
    before = (out / "model.safetensors").read_bytes()

    def fail(*_, **__):
        raise RuntimeError("disk full")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr("transformers.ProcessorMixin.save_pretrained", fail)
        export(run_folder, out, "--force", "--dtype", "float32")
    assert (out / "model.safetensors").read_bytes() == before
    export(run_folder, out, "--force", "--dtype", "float32")
    assert (out / "model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_float16_does_not_make_infinities(capsys, tmp_path):
    model = talkative()
    with torch.no_grad():
        model.model.image_newline[3] = 1e5
    folder = save_folder(tmp_path / "saved", model=model)
    for part in ("model", "projector"):
        export(folder, tmp_path / part, "--part", part, "--dtype", "float16", expect=2)
        assert "image_newline contains 1e+05, which is above 6.55e+04; use bfloat16" in capsys.readouterr().err
        assert not (tmp_path / part).exists()


def test_other_families(tmp_path):
    talkative("llava").save_pretrained(tmp_path / "llava")
    family_processor("llava").save_pretrained(tmp_path / "llava")
    export(tmp_path / "llava", tmp_path / "export", "--max_shard_size", "30KB")
    opened = LlavaForConditionalGeneration.from_pretrained(tmp_path / "export")
    same_state(talkative("llava"), opened, torch.bfloat16)


@pytest.mark.parametrize("options", [[], ["--keep_names"]], ids=["published names", "kept names"])
@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_5_vl"])
def test_the_projector_of_every_family_that_is_trained(tmp_path, name, options):
    model, other = family_model(name), family_model(name, seed=9)
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "projector", "--part", "projector", "--dtype", "float32", *options)
    _, loop = trained_family(model.config.model_type, "test")
    before = {key: value.clone() for key, value in other.state_dict().items()}
    _load_projector(other, loop, str(tmp_path / "projector"))
    taken = {key for key in before if key.startswith(loop.projector)}
    assert len(taken) >= 4
    for key, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[key] if key in taken else before[key]), key
    with safe_open(str(tmp_path / "projector" / "model.safetensors"), "pt") as file:
        assert len(file.keys()) == len(taken)


def test_a_projector_that_training_does_not_read(tmp_path, capsys, monkeypatch):
    asked = [replace(f, loop=Lacks("-")) if f.model_type == "qwen2_vl" else f for f in families.FAMILIES]
    monkeypatch.setattr(families, "FAMILIES", asked)
    family_model("qwen2_vl").save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "projector", "--part", "projector", expect=2)
    words = (
        "holds a qwen2_vl, which the training loop does not support; it supports: llava_next, llava, llava_onevision"
    )
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "/nowhere"], "model /nowhere: no such folder here"),
        (["--model", "empty"], "no complete checkpoint yet"),
        (["--max_shard_size", "big"], "--max_shard_size=big is not a size such as 5GB"),
        (["--out", __file__], "is a file; use a folder"),
        (["--out", __file__ + "/inside"], "the folder cannot be created"),
    ],
)
def test_wrong_input_is_one_line(capsys, run_folder, tmp_path, monkeypatch, options, message):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    export(run_folder, "out", *options, expect=2)
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert len(error[error.index("vtprune export:") :].strip().splitlines()) == 2
