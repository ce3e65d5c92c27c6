"""Opening a checkpoint runs no code: hostile files, methods named by ``config.json``, names that lead elsewhere."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.support.checkpoints import save_folder, save_images
from tests.support.hostile import Payload, as_bin, infect, module, name_method, pickled, seal
from tests.support.runner import ROOT, WARM, Runs, assert_equal_checkpoints
from vtprune_train import prune
from vtprune_train.cli import main
from vtprune_train.evaluation.answering import load
from vtprune_train.files import pickles
from vtprune_train.models.io.build import resolve_checkpoint
from vtprune_train.models.io.original import read_bin
from vtprune_train.training.checkpoint import manifest

pytestmark = pytest.mark.slow

CLI = ROOT / "vtprune_train" / "cli" / "__main__.py"
SCALER = "deepspeed.runtime.fp16.loss_scaler.LossScaler"
# Each stage has files of its own; one of each kind is made hostile.
FILES = {
    ("zero0", "bfloat16"): ["mp_rank_00_model_states.pt"],
    ("zero1", "bfloat16"): ["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"],
    ("zero2", "float32"): ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"],
    ("zero3", "float32"): ["zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"],
}


def settings(stage, dtype):
    return ("data.eval=[]", "data.workers=0", f"deepspeed=configs/deepspeed/{stage}.json", f"model.dtype={dtype}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("trust"))


@pytest.fixture(scope="module")
def trained(runs):
    """A run of each kind, made when it is first asked for."""
    done = {}

    def run(stage, dtype):
        if (stage, dtype) not in done:
            runs.run(f"{stage}-{dtype}", *settings(stage, dtype), "run.stop_after=1")
            done[stage, dtype] = runs.directory(f"{stage}-{dtype}")
        return done[stage, dtype]

    return run


def copy_of(runs, folder, name):
    shutil.copytree(folder, runs.directory(name))
    return runs.directory(name)


def command(runs, *arguments):
    """``vtprune`` in a process of its own: its exit code and what it said."""
    with (runs.folder / "command.log").open("w+b") as log:
        process = WARM.start(
            [str(CLI), *map(str, arguments)],
            ranks=1, cwd=runs.folder, env=runs.environment(), out=log.fileno(), err=log.fileno(),
        )  # fmt: skip
        code = process.wait(timeout=200)
    return code, (runs.folder / "command.log").read_text()


# ------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize(("stage", "dtype", "file"), [(*kind, file) for kind, files in FILES.items() for file in files])
def test_a_hostile_file_refuses_to_resume(runs, trained, tmp_path, stage, dtype, file):
    """With a manifest that is right about it. Nothing is passed over, set aside or trained."""
    name, mark = f"{stage}-{dtype}-{file}".replace(".", "-"), tmp_path / "ran"
    copy_of(runs, trained(stage, dtype), name)
    checkpoint = runs.checkpoint(name)
    infect(checkpoint / "deepspeed" / file, mark)
    seal(checkpoint)
    done = runs.run(name, *settings(stage, dtype), expect=2)
    assert f"{file} names posix.system: " in done.stderr and "Traceback" not in done.stderr
    assert f"To continue from the previous checkpoint, remove {checkpoint}" in done.stderr
    assert not mark.exists() and manifest.steps(checkpoint.parent) == [checkpoint]


def test_settings_of_a_checkpoint_are_compared_without_running_its_method(runs, trained, tmp_path):
    copy_of(runs, trained("zero2", "float32"), "hostile-settings")
    checkpoint, mark = runs.checkpoint("hostile-settings"), tmp_path / "ran"
    old = yaml.safe_load((checkpoint / "config.yaml").read_text())
    old["pruning"] = {"method": [{"method": f"{module(tmp_path / 'hostile_settings.py', mark)}:Evil"}]}
    for key in ("optimizer", "schedule"):
        old["train"][key] = f"{module(tmp_path / f'hostile_{key}.py', mark)}:Evil"
    old["model"]["attention"] = f"{module(tmp_path / 'hostile_attention.py', mark)}:Evil"
    old["callbacks"] = [f"{module(tmp_path / 'hostile_callback.py', mark)}:Evil"]
    old["data"]["train"][0]["reader"] = f"{module(tmp_path / 'hostile_reader.py', mark)}:Evil"
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(old))
    seal(checkpoint)
    done = runs.run("hostile-settings", *settings("zero2", "float32"), "run.stop_after=2")
    assert not mark.exists()
    assert f"changed since that checkpoint: train.schedule: '{old['train']['schedule']}' -> 'cosine'" in done.stderr
    assert "changed since that checkpoint: pruning.method: [{'method'" in done.stderr


def test_other_ranks_and_another_stage_are_refused_too(runs, trained, tmp_path):
    copy_of(runs, trained("zero2", "float32"), "elastic")
    checkpoint, mark = runs.checkpoint("elastic"), tmp_path / "ran"
    file = checkpoint / "deepspeed" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    infect(file, mark)
    seal(checkpoint)
    done = runs.run("elastic", *settings("zero3", "bfloat16"), ranks=2, expect=1)  # the launcher's; the ranks' is 2
    assert f"{file} names posix.system: " in done.stderr and not mark.exists()
    code, said = command(runs, "checkpoint", "convert", runs.directory("elastic"))
    assert code == 2 and f"{file} names posix.system: " in said and not mark.exists()
    code, said = command(runs, "checkpoint", "verify", runs.directory("elastic"))
    assert code == 1 and f"deepspeed/{file.name} names posix.system" in said and not mark.exists()


BEHIND = """
import sys
from vtprune_train.files import pickles
pickles.foreign_names = lambda path: []  # as if the file had been exchanged after it was looked at
from vtprune_train.cli import train_main
sys.exit(train_main())
"""


@pytest.mark.parametrize(("stage", "dtype"), [("zero2", "float32"), ("zero3", "float32")])
def test_deepspeed_itself_reads_tensors_alone(runs, trained, tmp_path, stage, dtype):
    """Behind the look at the names stands PyTorch's restricted unpickler, also where DeepSpeed opens its files."""
    script, name, mark = tmp_path / "behind.py", f"behind-{stage}", tmp_path / "ran"
    script.write_text(BEHIND)
    copy_of(runs, trained(stage, dtype), name)
    checkpoint = runs.checkpoint(name)
    infect(checkpoint / "deepspeed" / FILES[stage, dtype][1], mark)
    seal(checkpoint)
    done = runs.run(name, *settings(stage, dtype), expect=2, script=script)
    assert "cannot be read as tensors and numbers" in done.stderr and not mark.exists()


def test_a_checkpoint_with_classes_of_deepspeed_resumes_with_the_same_bits(runs, trained):
    """As all versions have written them; bfloat16 under ZeRO-1."""
    kind = ("zero1", "bfloat16")
    copy_of(runs, trained(*kind), "goes-on")
    written = next((runs.checkpoint("goes-on") / "deepspeed").glob("*optim_states.pt"))
    assert SCALER in torch.serialization.get_unsafe_globals_in_checkpoint(str(written))
    assert pickles.foreign_names(written) == []
    runs.run("goes-on", *settings(*kind), "run.stop_after=2")
    runs.run("at-once", *settings(*kind), "run.stop_after=2")
    assert_equal_checkpoints(runs.checkpoint("goes-on"), runs.checkpoint("at-once"))


def test_the_scaler_of_float16_is_read_as_numbers(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(2.0**16, 2.0, 1000, 1.0, 2, False, dtype=torch.float16)
    torch.save({"loss_scaler": scaler, "weight": torch.ones(3)}, tmp_path / "a.pt")
    found = pickles.read(tmp_path / "a.pt", mmap=True)
    assert type(found["loss_scaler"]) is SimpleNamespace and vars(found["loss_scaler"]) == vars(scaler)
    assert torch.equal(found["weight"], torch.ones(3))


# ------------------------------------------------------------------------------------------------ looking at files


@pytest.mark.parametrize("form", [0, 1, 2, 3, 4, 5, "zip", "legacy"])
def test_names_are_found_in_every_form(tmp_path, form):
    path, mark = tmp_path / "some.bin", tmp_path / "ran"
    if isinstance(form, int):
        pickled(path, mark, form)
    else:
        torch.save({"weight": torch.ones(2)}, path)
        infect(path, mark, _use_new_zipfile_serialization=form == "zip")
    assert "posix.system" in pickles.foreign_names(path)
    with pytest.raises(ValueError, match=r"some\.bin names .*posix\.system.*None of it was run"):
        pickles.read(path)
    assert not mark.exists()
    if isinstance(form, int):
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert mark.exists(), "the payload does something where a file is opened the usual way"


@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x04\x8c\x05posix\x8c\x06system\x8c\x0bcollections\x8c\x0bOrderedDict00\x93.",  # popped again
        b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94h\x00h\x01\x93.",  # taken out of the memo
        b"\x80\x04\x8c\x06systemN0\x8c\x05posix\x8c\x06system\x93.",
        b"(S'echo'\niposix\nsystem\n.",  # the oldest protocol
        b"\x80\x02\x82\x01.",  # an extension that copyreg knows
        b"\x80\x02cposix\nsystem\n\xff",  # broken off
    ],
)
def test_no_trick_hides_a_name(tmp_path, code):
    (tmp_path / "a.pkl").write_bytes(code)
    assert pickles.foreign_names(tmp_path / "a.pkl")


def test_a_zip_file_at_the_end_hides_no_name(tmp_path):
    """PyTorch tells a zip file by its beginning, Python's ``zipfile`` by its end."""
    path, mark = tmp_path / "a.pt", tmp_path / "ran"
    pickled(path, mark, 2)
    torch.save({"weight": torch.ones(2)}, tmp_path / "b.pt")
    path.write_bytes(path.read_bytes() + (tmp_path / "b.pt").read_bytes())
    assert zipfile.is_zipfile(path) and "posix.system" in pickles.foreign_names(path)
    with pytest.raises(ValueError, match=r"names posix\.system"):
        pickles.read(path)
    assert not mark.exists()


def test_files_of_other_kinds_are_no_pickles_by_chance(tmp_path):
    save_file({f"t{number:03d}": torch.zeros(2) for number in range(11)}, tmp_path / "model.safetensors")
    (tmp_path / "0_param.tensor.swp").write_bytes(b"\x80\x02" + bytes(range(1, 200)))
    assert (tmp_path / "model.safetensors").read_bytes()[:2] == b"\x80\x02", "it begins as a pickle does"
    pickles.check_folder(tmp_path)
    with pytest.raises(ValueError, match="cannot be parsed"):
        pickles.check((tmp_path / "0_param.tensor.swp").rename(tmp_path / "damaged.pt"))


@pytest.mark.parametrize("content", [b"", b"\x80", b"\x80\x02", b"PK\x03\x04", b"\x80\x02]q\x00.", bytes(100)])
def test_a_damaged_file_is_named_and_nobody_is_told_to_run_it(tmp_path, content):
    (tmp_path / "a.bin").write_bytes(content)
    for reader in (pickles.read, read_bin):
        with pytest.raises(ValueError, match=r"a\.bin (cannot be read as tensors|is damaged)") as error:
            reader(tmp_path / "a.bin")
        assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("place", ["before", "data.pkl", "more/data.PKL", "archive/note"])
def test_a_pickle_in_or_before_a_zip_file_is_found(tmp_path, place):
    """Also one that PyTorch would pass over, as another reader may not."""
    path, mark = tmp_path / "some.pt", tmp_path / "ran"
    torch.save({"weight": torch.ones(2)}, path)
    assert pickles.foreign_names(path) == []
    hidden = pickle.dumps(Payload(mark))
    if place == "before":
        path.write_bytes(hidden + path.read_bytes())
    else:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(place if "/" in place else f"some/{place}", hidden, zipfile.ZIP_DEFLATED)
    assert pickles.foreign_names(path) == ["posix.system"] and not mark.exists()


def test_an_old_pickle_is_found_whatever_its_name(tmp_path):
    pickled(tmp_path / "notes.txt", tmp_path / "ran", 0)
    (tmp_path / "text.txt").write_text("confusion\nmatrix\n")
    assert pickles.pickled_files(tmp_path) == [tmp_path / "notes.txt"]


@pytest.mark.parametrize("content", [None, [1, 2], "text"])
def test_a_file_that_holds_no_state_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt contains a \w+, not a dictionary of tensors"):
        pickles.read(tmp_path / "a.pt")


def test_settings_of_an_adapter_that_name_a_module_are_refused(folder, tmp_path, capsys):
    shutil.copytree(folder / "hf", tmp_path / "hf")
    adapter = {"peft_type": "LORA", "target_modules": ["q_proj"], "megatron_config": {"a": 1}, "megatron_core": "evil"}
    (tmp_path / "hf" / "adapter_config.json").write_text(json.dumps(adapter))
    assert main(["export", "--model", str(tmp_path / "hf"), "--out", str(tmp_path / "out")]) == 2
    assert "adapter_config.json has megatron_config, for which PEFT imports code" in capsys.readouterr().err


def test_code_named_deep_inside_is_noted(runs, trained, capsys):
    copy_of(runs, trained("zero2", "float32"), "deep")
    file = runs.checkpoint("deep") / "hf" / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_processor": {"auto_map": {"A": "evil.Evil"}}}))
    name_method(file.parent, {"method": ["evil.py:Evil"]})
    seal(runs.checkpoint("deep"))
    assert main(["checkpoint", "verify", str(runs.checkpoint("deep"))]) == 0
    said = capsys.readouterr().out
    assert "note: hf/processor_config.json names remote code (auto_map)" in said
    assert "note: hf/config.json names the method evil.py:Evil" in said


def test_verify_finds_pickles_wherever_they_lie_and_needs_no_deepspeed(runs, trained, tmp_path, capsys):
    copy_of(runs, trained("zero2", "float32"), "verified")
    checkpoint, mark = runs.checkpoint("verified"), tmp_path / "ran"
    pickled(checkpoint / "hf" / "training_args.bin", mark, 0)
    pickled(checkpoint / "hf" / "without_an_ending", mark, 4)
    name_method(checkpoint / "hf", "evil.py:Evil", auto_map={"AutoConfig": "evil.Config"})
    seal(checkpoint)
    without = "import sys; sys.modules['deepspeed'] = None; from vtprune_train.cli import main; sys.exit(main())"
    verify = [sys.executable, "-c", without, "checkpoint", "verify", str(checkpoint)]
    done = subprocess.run(verify, capture_output=True, text=True, env=runs.environment())
    assert done.returncode == 1, done.stderr
    assert "2 error(s)" in done.stdout and not mark.exists()
    for said in (
        "hf/training_args.bin names posix.system",
        "hf/without_an_ending names posix.system",
        "note: hf/config.json names the method evil.py:Evil",
        "note: hf/config.json names remote code (auto_map)",
    ):
        assert said in done.stdout
    for name in ("training_args.bin", "without_an_ending"):
        (checkpoint / "hf" / name).unlink()
    seal(checkpoint)
    assert main(["checkpoint", "verify", str(checkpoint)]) == 0, "code that is not run by opening is no damage"
    assert "note: hf/config.json names the method evil.py:Evil" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ weights, settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_folder(folder / "hf")
    save_images(folder, 1)[0].rename(folder / "cat.jpg")
    (folder / "data.json").write_text(
        json.dumps([{"id": "a", "image": "cat.jpg", "conversations": [
            {"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "left"}]}])
    )  # fmt: skip
    return folder


def asked(folder, out):
    """The commands that open a model."""
    model = ["--model", folder / "hf"]
    return {
        "generate": ["generate", *model, "--image", folder / "cat.jpg", "--prompt", "what", "--max_new_tokens", "2"],
        "eval": ["eval", *model, "--data", folder / "data.json", "--images", folder, "--out", out / "answers.jsonl"],
        "export": ["export", *model, "--out", out / "export"],
        "show": ["show", *model, "--image", folder / "cat.jpg", "--prompt", "what", "--out", out / "show.png"],
        "estimate": ["estimate", *model],
        "original": ["convert", *model, "--to", "original", "--out", out / "original"],
    }


@pytest.mark.parametrize("name", ["generate", "eval", "export"])
def test_hostile_weights_are_refused_by_the_commands(runs, folder, tmp_path, name):
    shutil.copytree(folder, tmp_path / "copy")
    file = as_bin(tmp_path / "copy" / "hf", tmp_path / "ran")
    code, said = command(runs, *asked(tmp_path / "copy", tmp_path)[name])
    assert code == 2 and f"{file} names posix.system: " in said and not (tmp_path / "ran").exists()


def test_hostile_weights_are_refused_by_a_new_run(runs, trained, tmp_path):
    source = copy_of(runs, trained("zero2", "float32"), "source")
    checkpoint = runs.checkpoint("source")
    file = as_bin(checkpoint / "hf", tmp_path / "ran")
    seal(checkpoint)
    done = runs.run("tuned", *settings("zero2", "float32"), f"train.init_from={source}", expect=2)
    assert f"{file} names posix.system: " in done.stderr and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["generate", "eval", "show", "estimate"])
def test_a_method_that_a_checkpoint_names_is_not_imported(folder, tmp_path, monkeypatch, capsys, name):
    """Neither from a file seen from the working folder nor as a module of it; with the user's word it is."""
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    mark = tmp_path / "ran"
    module(tmp_path / "evil.py", mark)
    arguments = [*map(str, asked(tmp_path / "copy", tmp_path)[name])]
    for method in ("evil.py:Evil", "evil:Evil", [{"method": "uniform"}, {"method": "evil.py:Evil"}]):
        name_method(tmp_path / "copy" / "hf", method)
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert "was saved with the method evil" in said and "--trust_remote_code" in said
        assert str(tmp_path / "copy" / "hf") in said
        assert not mark.exists() and "evil" not in sys.modules
    name_method(tmp_path / "copy" / "hf", "evil.py:Evil")
    try:
        assert main([*arguments, "--trust-remote-code"]) == 0, capsys.readouterr().err
    finally:
        sys.modules.pop("evil", None)
    assert mark.exists()


@pytest.mark.parametrize("name", ["export", "original"])
def test_what_needs_no_method_runs_none(folder, tmp_path, monkeypatch, name):
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    module(tmp_path / "evil.py", tmp_path / "ran")
    name_method(tmp_path / "copy" / "hf", "evil.py:Evil")
    code = main([*map(str, asked(tmp_path / "copy", tmp_path)[name])])
    assert code == (2 if name == "original" else 0)  # here for want of a vision tower's name
    assert not (tmp_path / "ran").exists()


def test_in_python_the_word_is_an_argument(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "hf", tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    module(tmp_path / "evil.py", tmp_path / "ran")
    name_method(tmp_path / "hf", "evil.py:Evil")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load(str(tmp_path / "hf"))
    model = load(str(tmp_path / "hf"), None).model
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        prune(model)
    assert not (tmp_path / "ran").exists()
    try:
        prune(model, trust_remote_code=True)
        load(str(tmp_path / "hf"))  # imported by now: nothing is run by opening it
    finally:
        sys.modules.pop("evil", None)


def test_a_new_run_takes_a_method_over_only_if_it_names_it(runs, trained, tmp_path, monkeypatch):
    source, mark = copy_of(runs, trained("zero2", "float32"), "named"), tmp_path / "ran"
    evil = f"{module(tmp_path / 'evil.py', mark)}:Evil"
    name_method(runs.checkpoint("named") / "hf", evil)
    seal(runs.checkpoint("named"))
    own = {key: value for key, value in yaml.safe_load(runs.config.read_text()).items() if key != "pruning"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    monkeypatch.setattr(runs, "config", tmp_path / "own.yaml")
    new = (f"train.init_from={source}", *settings("zero2", "float32"), "run.stop_after=1")
    done = runs.run("new", *new, expect=2)
    assert f"name it in this run's own settings: pruning.method={evil}" in done.stderr and not mark.exists()
    runs.run("new", *new, f"pruning.method={evil}")
    assert mark.exists()


def test_code_beside_a_config_is_not_followed(folder, tmp_path, capsys):
    shutil.copytree(folder / "hf", tmp_path / "hf")
    module(tmp_path / "hf" / "evil.py", tmp_path / "ran")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert main(["estimate", "--model", str(tmp_path / "hf")]) == 2
    assert "(auto_map), which is not run" in capsys.readouterr().err
    tokenizer = json.loads((folder / "hf" / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    shutil.copy(folder / "hf" / "config.json", tmp_path / "hf" / "config.json")
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert (
        main(["export", "--model", str(tmp_path / "hf"), "--out", str(tmp_path / "out")]) == 0
    )  # by transformers' own
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------ names of files


@pytest.mark.parametrize("name", ["../../outside.json", "/etc/hostname", "hf/../../../outside.json", "hf//x", ""])
def test_a_manifest_names_files_of_its_checkpoint_alone(runs, trained, tmp_path, capsys, name):
    shutil.copytree(trained("zero2", "float32"), tmp_path / "run")
    checkpoint = manifest.steps(tmp_path / "run" / "checkpoints")[-1]
    outside = tmp_path / "run" / "outside.json"
    outside.write_text("{}")
    content = json.loads((checkpoint / "manifest.json").read_text())
    content["files"][name] = manifest.sync_and_hash(outside)
    (checkpoint / "manifest.json").write_text(json.dumps(content))
    assert main(["checkpoint", "verify", str(checkpoint)]) == 1
    assert f"names {name}, which is outside the checkpoint" in capsys.readouterr().out
    assert main(["checkpoint", "convert", str(checkpoint), "--out", str(tmp_path / "a" / "b" / "c")]) == 2
    assert "which is outside the checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "a").exists() and outside.read_text() == "{}"


def test_links_out_of_a_checkpoint_are_not_followed(runs, trained, tmp_path, capsys):
    shutil.copytree(trained("zero2", "float32"), tmp_path / "run")
    checkpoint = manifest.steps(tmp_path / "run" / "checkpoints")[-1]
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").write_text("mine")
    (checkpoint / "hf" / "note.txt").symlink_to(tmp_path / "secret")
    seal(checkpoint)
    assert main(["checkpoint", "verify", str(checkpoint)]) == 1
    assert f"hf/note.txt is a link to {tmp_path / 'secret'}, outside the checkpoint" in capsys.readouterr().out
    assert main(["checkpoint", "convert", str(checkpoint), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    (checkpoint / "folder").symlink_to(tmp_path / "folder")
    manifest.remove_checkpoint(checkpoint)
    assert not checkpoint.exists() and (tmp_path / "folder" / "kept").exists() and (tmp_path / "secret").exists()
    linked = checkpoint.with_name("step_00000009")
    linked.symlink_to(tmp_path / "folder")
    manifest.remove_checkpoint(linked)
    assert not os.path.lexists(linked) and not os.path.lexists(linked.with_suffix(".deleting"))
    assert (tmp_path / "folder" / "kept").exists()


def test_latest_and_indexes_name_their_own_folder_alone(folder, tmp_path, capsys):
    other = tmp_path / "other" / "checkpoints" / "step_00000001"
    other.mkdir(parents=True)
    (other / "manifest.json").write_text("{}")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "latest").write_text("../../other/checkpoints/step_00000001")
    assert manifest.named_latest(tmp_path / "run" / "checkpoints") is None
    with pytest.raises(ValueError, match="no complete checkpoint"):
        resolve_checkpoint(str(tmp_path / "run"))
    shutil.copytree(folder / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["export", "--model", str(tmp_path / "hf"), "--out", str(tmp_path / "out")]) == 2
    assert "names ../model.safetensors, which is not a file of its folder" in capsys.readouterr().err
