"""Code in files is found by what they hold: whatever they are called, and whatever they are packed into."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.support.checkpoints import save_folder, save_images
from tests.support.hostile import Payload, seal
from tests.support.runner import Runs
from vtprune_train.cli import main
from vtprune_train.files import pickles

pytestmark = pytest.mark.slow


def in_zip(path, payload, name="in.pt"):
    content = io.BytesIO()
    torch.save({"a": payload}, content)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content.getvalue())


def in_tar(path, payload):
    content = pickle.dumps(payload)
    entry = tarfile.TarInfo("pickle")
    entry.size = len(content)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(entry, io.BytesIO(content))


def after_others(number):
    return lambda path, payload: path.write_bytes(pickle.dumps(1) * number + pickle.dumps(payload))


def packed(pack, protocol):
    return lambda path, payload: path.write_bytes(pack(pickle.dumps(payload, protocol)))


def torch_file(path, payload):
    with path.open("wb") as file:
        torch.save({"a": payload}, file)


def objects(save):
    def write(path, payload):
        with path.open("wb") as file:
            save(file, np.array([payload], dtype=object))

    return write


HIDDEN = {
    "hf/weights": torch_file,
    "deepspeed/extra.dat": torch_file,
    "hf/optimizer.PT": torch_file,
    "hf/a.pth.tar": torch_file,
    "hf/model2.safetensors": torch_file,
    "hf/a.npy": objects(np.save),
    "deepspeed/a.npz": objects(np.savez),
    "hf/a.pkl": packed(gzip.compress, 4),
    "logs/more.jsonl.gz": packed(gzip.compress, 2),
    "logs/oldest.jsonl.gz": packed(gzip.compress, 0),
    "hf/a.bz2": packed(bz2.compress, 4),
    "hf/a.joblib": packed(lzma.compress, 4),
    "hf/a.zip": in_zip,
    "hf/old.pt": in_tar,
    "hf/sixth.pkl": after_others(6),
    "hf/hundredth": after_others(99),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What training writes into a checkpoint, by kind of file; sealed."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints" / "step_00000001"
    save_folder(folder / "hf")
    (folder / "deepspeed").mkdir()
    (folder / "logs").mkdir()
    torch.save({"weight": torch.ones(3), "dtype": torch.bfloat16}, folder / "deepspeed" / "mp_rank_00_model_states.pt")
    (folder / "logs" / "metrics.jsonl.gz").write_bytes(gzip.compress(b'{"step": 1}\n' * 1000))
    np.save(folder / "logs" / "numbers.npy", np.ones(3))
    np.savez(folder / "logs" / "numbers.npz", a=np.ones(3), b=np.array(["text"]))
    (folder / "trainer.json").write_text("{}")
    seal(folder)
    return folder


def test_what_training_writes_is_ok(checkpoint, capsys):
    assert main(["checkpoint", "verify", str(checkpoint)]) == 0
    assert capsys.readouterr().out.endswith(": ok\n")


@pytest.mark.parametrize("name", HIDDEN)
def test_verify_looks_at_content_whatever_the_name(checkpoint, tmp_path, capsys, name):
    file, mark = checkpoint / name, tmp_path / "ran"
    HIDDEN[name](file, Payload(mark))
    seal(checkpoint)
    try:
        assert main(["checkpoint", "verify", str(checkpoint)]) == 1
        said = capsys.readouterr().out
        assert f"{name} names " in said and "posix.system" in said and not mark.exists()
        if name.startswith("deepspeed/"):
            with pytest.raises(pickles.ForeignCodeError, match=rf"{file.name} names .*posix\.system"):
                pickles.check_folder(checkpoint / "deepspeed")
    finally:
        file.unlink()
        seal(checkpoint)


def test_large_files_are_not_read_whole(tmp_path):
    """Weights by their first bytes; a compressed file up to a bound, and one that goes on behind it is not passed."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write((2).to_bytes(8, "little") + b"{}")
        file.truncate(4 << 30)
    (tmp_path / "zeros.gz").write_bytes(gzip.compress(bytes(2 * pickles.LARGEST_UNPACKED), 1))
    tracemalloc.start()
    try:
        pickles.check_folder(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 4 * pickles.LARGEST_UNPACKED
    finally:
        tracemalloc.stop()
    (tmp_path / "zeros.gz").write_bytes(gzip.compress(pickle.dumps(bytes(2 * pickles.LARGEST_UNPACKED)), 1))
    with pytest.raises(pickles.ForeignCodeError, match=r"zeros\.gz is damaged"):
        pickles.check_folder(tmp_path)


def test_numbers_behind_old_pickles_are_no_names(tmp_path):
    """The number of a storage's elements comes first; 130 and 147 are instructions that would name something."""
    for size in (130, 147, 640):
        torch.save({"a": torch.ones(size)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
        assert pickles.foreign_names(tmp_path / "a.pt") == []


def test_the_end_of_a_file_that_looks_like_a_zip_file_s_is_no_damage(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}" + b"PK\5\6" + b"\xff" * 30)
    pickles.check_folder(tmp_path)


# ------------------------------------------------------------------------------------------------ resume


def test_resume_refuses_what_lies_beside_the_files_it_opens(tmp_path):
    runs = Runs(tmp_path / "runs")
    given = ("data.eval=[]", "data.workers=0")
    runs.run("beside", *given, "run.stop_after=1")
    checkpoint, mark = runs.checkpoint("beside"), tmp_path / "ran"
    torch_file(checkpoint / "deepspeed" / "extra", Payload(mark))
    seal(checkpoint)
    done = runs.run("beside", *given, expect=2)
    assert "deepspeed/extra names posix.system: " in done.stderr and not mark.exists()
    (checkpoint / "deepspeed" / "extra").unlink()
    (checkpoint / "trainer.json").write_bytes(pickle.dumps(Payload(mark)))
    seal(checkpoint)
    done = runs.run("beside", *given, expect=2)
    assert f"{checkpoint / 'trainer.json'} is not JSON: it is not UTF-8" in done.stderr and not mark.exists()


# ------------------------------------------------------------------------------------------------ weights, attention


@pytest.fixture
def model(tmp_path):
    save_folder(tmp_path / "hf")
    save_images(tmp_path, 1)[0].rename(tmp_path / "cat.jpg")
    return tmp_path / "hf"


def generate(model):
    picture = str(model.parent / "cat.jpg")
    return main(["generate", "--model", str(model), "--image", picture, "--prompt", "a", "--max_new_tokens", "1"])


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("pytorch_model.bin", None),
        ("w.pkl", "pytorch_model.bin.index.json"),
        ("w.dat", "model.safetensors.index.json"),
        ("model.safetensors", None),
        ("named.bin", "config.json"),
    ],
)
def test_every_file_of_weights_is_looked_at(model, tmp_path, capsys, name, index):
    """Whatever stands beside it."""
    (model / "model.safetensors").unlink()
    save_file({"x": torch.ones(1)}, model / "junk.safetensors")
    torch_file(model / name, Payload(tmp_path / "ran"))
    if index == "config.json":
        config = json.loads((model / index).read_text())
        (model / index).write_text(json.dumps({**config, "transformers_weights": name}))
    elif index is not None:
        (model / index).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}}))
    assert generate(model) == 2
    said = capsys.readouterr().err
    assert f"{model / name} names posix.system: " in said and "weights_only" not in said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_no_error_repeats_the_advice_to_trust_a_file(model, tmp_path, capsys, monkeypatch, legacy):
    """Where PyTorch is what refuses."""
    monkeypatch.setattr(pickles, "check", lambda path: None)
    (model / "model.safetensors").unlink()
    if legacy:
        in_tar(model / "pytorch_model.bin", Payload(tmp_path / "ran"))
    else:
        torch_file(model / "pytorch_model.bin", Payload(tmp_path / "ran"))
    assert generate(model) == 2
    said = capsys.readouterr().err
    assert "cannot be loaded (" in said and "likely succeed" not in said and "weights_only set" not in said
    assert legacy or "posix.system" in said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("section", "key", "value", "named"),
    [
        (None, "attn_implementation", "evil/kernel", "attn_implementation='evil/kernel'"),
        (None, "_attn_implementation", "evil/kernel@v1:run", "_attn_implementation='evil/kernel@v1:run'"),
        (None, "attn_implementation", {"": "paged|evil/x"}, "attn_implementation='paged|evil/x'"),
        ("text_config", "_attn_implementation", "evil/kernel", "text_config._attn_implementation='evil/kernel'"),
        ("vision_config", "attn_implementation", "evil/kernel", "vision_config.attn_implementation='evil/kernel'"),
    ],
)
def test_a_kernel_of_the_hub_is_not_fetched(model, checkpoint, capsys, section, key, value, named):
    config = json.loads((model / "config.json").read_text())
    (config if section is None else config[section])[key] = value
    (model / "config.json").write_text(json.dumps(config))
    for code in (generate(model), main(["estimate", "--model", str(model)])):
        assert code == 2
    said = capsys.readouterr().err
    assert said.count(f"config.json of {model} has {named}, a kernel of the hub") == 2 and "set it to sdpa" in said
    before = (checkpoint / "hf" / "config.json").read_text()
    (checkpoint / "hf" / "config.json").write_text(json.dumps(config))
    seal(checkpoint)
    assert main(["checkpoint", "verify", str(checkpoint)]) == 0
    assert "note: hf/config.json names a kernel of the hub (" + named.replace("'", "") in capsys.readouterr().out
    (checkpoint / "hf" / "config.json").write_text(before)
    seal(checkpoint)


@pytest.mark.parametrize("value", ["eager", "sdpa"])
def test_attention_of_transformers_is_taken(model, value):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attn_implementation": value}))
    assert generate(model) == 0
