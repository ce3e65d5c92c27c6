"""Models built sharded under ZeRO-3, two ranks: the numbers of a model built whole; exports made later."""

import re
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.families import family_model, tokenizer
from tests.support.family_runs import NAMES, save_checkpoint
from tests.support.model_parts import save_parts
from tests.support.runner import BIN, ROOT, Runs, assert_equal_checkpoints, assert_same_metrics
from vtprune_train.cli import main
from vtprune_train.models.io.build import resolve_checkpoint

pytestmark = pytest.mark.slow

ZERO3 = ("deepspeed={zero_optimization: {stage: 3, stage3_param_persistence_threshold: 10}}",)
SHORT = (*ZERO3, "data.eval=[]", "train.max_steps=3", "train.epochs=1")
WHOLE = ROOT / "tests" / "support" / "whole.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def base(runs):
    """A checkpoint that others start from."""
    runs.run("base", *SHORT, "train.max_steps=1", ranks=2)
    return runs.directory("base")


def check_equal(runs, name, *settings):
    """The run built sharded and built whole, to the last bit; the export of the second made afterwards."""
    done = runs.run(name, *SHORT, *settings, ranks=2)
    assert "building the model sharded, one parameter at a time" in done.stdout + done.stderr
    done = runs.run(f"{name}_whole", *SHORT, *settings, "train.export=never", ranks=2, script=WHOLE)
    assert "building the model sharded" not in done.stdout + done.stderr
    assert len(runs.metrics(name)) == 3
    assert_same_metrics(runs.metrics(name), runs.metrics(f"{name}_whole"))
    export(runs.checkpoint(f"{name}_whole"))
    assert_equal_checkpoints(runs.checkpoint(name), runs.checkpoint(f"{name}_whole"))
    assert_same_files(runs.checkpoint(name) / "hf", runs.checkpoint(f"{name}_whole") / "hf")


def export(checkpoint):
    """Make the export that training left out, where training would have put it."""
    assert not (checkpoint / "hf").exists()
    with pytest.raises(ValueError, match=r"no Hugging Face export .* `vtprune export --model"):
        resolve_checkpoint(str(checkpoint))
    assert main(["export", "--model", str(checkpoint), "--out", str(checkpoint / "hf")]) == 0
    assert resolve_checkpoint(str(checkpoint)) == str(checkpoint / "hf")


def assert_same_files(one, two):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for name in names:
        if name != "base.json":  # each run has a base of its own
            assert (one / name).read_bytes() == (two / name).read_bytes(), name


LORA = ("model.peft={r: 4, alpha: 8}", "model.train={lora: 1.0e-2, projector: 1.0e-2}")
KINDS = {
    "sizes": (),
    "half": ("model.dtype=bfloat16",),
    "checkpoint": ("BASE",),
    "offloaded": ("BASE", "deepspeed=configs/deepspeed/zero3_offload.json"),
    "adapter": ("BASE", *LORA),
    "dora": ("BASE", *LORA, "model.peft.kind=dora"),
    "learned": ("BASE", "pruning.method=voco", "model.train.pruning=1.0e-2"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_equals_whole(runs, base, kind):
    start = f"train.init_from={base}"
    check_equal(runs, kind, *(start if setting == "BASE" else setting for setting in KINDS[kind]))


def test_parts_with_a_fresh_projector_and_then_with_that_projector(tmp_path):
    runs = Runs(tmp_path)
    save_parts(tmp_path)
    parts = (
        "model.config=null",
        f"model.language_model={tmp_path / 'language'}",
        f"model.vision_tower={tmp_path / 'tower'}",
        "model.image_grid_pinpoints=[[28,56],[56,28],[56,56]]",
        "pruning.layers=[1, 3, 5]",
        "data.max_tokens=900",
        "data.max_length=600",
    )
    stage_1 = ("data.template=plain", "data.train.0.take=first:3", "train.global_batch_size=1")
    check_equal(runs, "stage1", *parts, *stage_1, "model.train={projector: 1e-2}")
    stage_2 = (f"model.projector={runs.directory('stage1')}", "model.train={language_model: 1e-2}")
    check_equal(runs, "stage2", *parts, *stage_2)


@pytest.mark.parametrize("stage", [0, 2])
def test_an_export_made_later_is_that_of_training(runs, stage):
    """Where one file holds all weights."""
    for name in ("every", "never"):
        settings = ("model.dtype=bfloat16", f"train.export={name}", f"deepspeed=configs/deepspeed/zero{stage}.json")
        runs.run(f"{name}{stage}", *settings, "data.eval=[]", "train.max_steps=1")
    export(runs.checkpoint(f"never{stage}"))
    assert_same_files(runs.checkpoint(f"every{stage}") / "hf", runs.checkpoint(f"never{stage}") / "hf")


@pytest.fixture(scope="module")
def exported_last(runs, base):
    """Settings of a run with ``train.export=last``; it was stopped after step 2 and went on to step 3."""
    settings = (*SHORT, f"train.init_from={base}", "train.export=last", "train.save_every=1")
    runs.run("last", *settings, "run.stop_after=2", ranks=2)
    assert not list(runs.directory("last").glob("checkpoints/*/hf"))
    assert main(["checkpoint", "verify", str(runs.directory("last"))]) == 0
    runs.run("last", *settings, ranks=2)
    return settings


def test_the_last_checkpoint_is_exported(runs, exported_last):
    """The one of the last step alone; a run that was stopped goes on from a checkpoint without an export."""
    runs.run("uninterrupted", *exported_last, ranks=2)
    assert [path.parent.name for path in runs.directory("last").glob("checkpoints/*/hf")] == ["step_00000003"]
    assert_same_metrics(runs.metrics("last"), runs.metrics("uninterrupted"))
    assert_equal_checkpoints(runs.checkpoint("last"), runs.checkpoint("uninterrupted"))


def test_an_export_from_the_portable_form(runs, exported_last):
    checkpoint = runs.directory("last") / "checkpoints" / "step_00000002"
    for name, source in (("direct", checkpoint), ("portable", runs.folder / "portable" / "step_00000002")):
        if name == "portable":
            assert main(["checkpoint", "convert", str(checkpoint), "--out", str(source)]) == 0
        assert main(["export", "--model", str(source), "--out", str(runs.folder / name / "hf")]) == 0
    assert_same_files(runs.folder / "direct" / "hf", runs.folder / "portable" / "hf")


def without(tensors, name):
    del tensors[name]


def cut(tensors, name):
    tensors[name] = tensors[name][:-1].clone()


FAULTS = {
    "missing": (
        without,
        r"1 weight\(s\) of the LlavaNextForConditionalGeneration are missing, first model.language_model",
    ),
    "wrong shape": (cut, r"model.path=.* cannot be loaded .*size mismatch|mismatch"),
    "unreadable": (None, r"model.path=.* cannot be (loaded|read)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_checkpoint_is_named_and_ends_all_ranks(runs, base, tmp_path, fault):
    folder = tmp_path / "faulty"
    shutil.copytree(resolve_checkpoint(str(base)), folder)
    change, message = FAULTS[fault]
    file = folder / "model.safetensors"
    if change is None:
        file.write_bytes(file.read_bytes()[:-8])
    else:
        tensors = load_file(file)
        change(tensors, next(name for name in tensors if name.endswith("layers.2.mlp.up_proj.weight")))
        save_file(tensors, file, metadata={"format": "pt"})
    settings = (*SHORT, "model.config=null", f"model.path={folder}")
    done = runs.run(f"faulty_{fault.split()[0]}", *settings, ranks=2, expect=1, timeout=120)
    assert re.search(message, done.stderr), done.stderr[-3000:]
    assert "Traceback" not in done.stderr


def test_options_that_need_an_export_say_so(runs, exported_last, capsys):
    checkpoint = runs.directory("last") / "checkpoints" / "step_00000002"
    command = ["export", "--model", str(checkpoint), "--out", str(runs.folder / "no"), "--dtype", "float16"]
    assert main(command) == 2
    assert "has no hf/: export it without --dtype first" in capsys.readouterr().err


def test_checkpoints_of_every_trained_family(tmp_path):
    """Also one in several files, one of torch.save, tied embeddings, and embeddings that grow for a new token."""

    for name in NAMES:
        save_checkpoint(name, tmp_path / name)
    tied, several, pickled, grown = (tmp_path / name for name in ("tied", "several", "pickled", "grown"))
    for folder in (tied, several, pickled, grown):
        save_checkpoint("llava", folder)
    model = family_model("llava")
    model.save_pretrained(several, max_shard_size="20KB")
    (several / "model.safetensors").unlink()
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    words = tokenizer()
    words.add_tokens([f"<new{number}>" for number in range(200)])
    words.save_pretrained(grown)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tied)
    folders = [str(tmp_path / name) for name in NAMES] + [str(f) for f in (tied, several, pickled, grown)]
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    script = ROOT / "tests" / "support" / "build_both.py"
    environment = Runs.environment(None)
    done = subprocess.run([*torchrun, script, *folders], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("equal")] == [f"equal {f}" for f in folders]
