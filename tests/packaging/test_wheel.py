"""The wheel, built and installed into fresh environments without network: what `pip install vtprune-train` gives."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import PackageNotFoundError, PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.runner import ROOT

pytestmark = pytest.mark.slow

INSTALLED = Path(sysconfig.get_path("purelib"))
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
RECIPES = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = (*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(ROOT))
    subprocess.run(build, check=True)
    [wheel] = folder.glob("*.whl")
    return wheel


def environment(folder, wheel):
    """A virtual environment that holds the wheel and nothing else; returns its site-packages."""
    venv.create(folder, with_pip=False)
    python = str(folder / "bin" / "python")
    subprocess.run((*PIP, "--python", python, "install", "--no-deps", "--no-index", str(wheel)), check=True)
    [site] = (folder / "lib").glob("python*/site-packages")
    return site


@pytest.fixture(scope="module")
def everything(wheel, tmp_path_factory):
    """The wheel beside all packages of the tests' environment, without the checkout."""
    folder = tmp_path_factory.mktemp("everything")
    (environment(folder, wheel) / "packages.pth").write_text(f"{INSTALLED}\n")
    return folder / "bin"


@pytest.fixture(scope="module")
def core(wheel, tmp_path_factory):
    """The wheel with the packages that it requires without extras, and those that they require."""
    folder = tmp_path_factory.mktemp("core")
    site = environment(folder, wheel)
    [metadata] = site.glob("vtprune_train-*.dist-info")
    for name in closure(PathDistribution(metadata).requires):
        for file in distribution(name).files or ():
            link = site / file.parts[0]
            if file.parts[0] != ".." and not link.exists():
                link.symlink_to(INSTALLED / file.parts[0])
    return folder / "bin"


def closure(requirements):
    """The names of the installed packages that requirements lead to, without extras."""
    names, waiting = set(), list(requirements)
    while waiting:
        wanted = Requirement(waiting.pop())
        if wanted.name in names or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        try:
            waiting += distribution(wanted.name).requires or ()
        except PackageNotFoundError:  # an optional part, as the CUDA libraries are for a CPU build of torch
            continue
        names.add(wanted.name)
    return names


def call(*command, cwd, expect=0):
    """Run a command of an environment, in a folder that has nothing to do with the checkout."""
    keep = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, env=keep)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def test_the_recipes_are_found_from_any_folder(everything, tmp_path):
    for name in ("quickstart.yaml", "configs/quickstart.yaml"):
        done = call(everything / "vtprune", "train", "--config", name, "--dry_run", cwd=tmp_path)
        assert re.search(r"^run +runs/quickstart$", done.stdout, re.MULTILINE), done.stdout
    code = f"""
import vtprune_train
from vtprune_train.config.load import load_config

assert "site-packages" in vtprune_train.__file__, vtprune_train.__file__
for recipe in {RECIPES}:
    for overrides in ([], ["deepspeed=deepspeed/zero1.json"], ["deepspeed=configs/deepspeed/zero3.json"]):
        assert load_config(recipe, overrides).deepspeed_config()["zero_optimization"]["stage"] in (1, 2, 3)
"""
    call(everything / "python", "-c", code, cwd=tmp_path)
    done = call(everything / "vtprune", "train", "--config", "quikstart.yaml", cwd=tmp_path, expect=2)
    assert all(f"configs/{name}" in done.stderr for name in RECIPES) and "did you mean" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_quickstart_brings_its_data(everything, tmp_path):
    """Drawn in the working folder; here less of it than a user gets."""
    code = """
from vtprune_train.cli import main, quickstart

quickstart.NUM_TRAIN, quickstart.NUM_EVAL = 64, 16
raise SystemExit(main(["quickstart", "train.epochs=1", "train.export=never"]))
"""
    done = call(everything / "python", "-c", code, cwd=tmp_path)
    assert "exact match" in done.stdout and "vtprune launch --nproc_per_node 2 --config quickstart.yaml" in done.stdout
    assert (tmp_path / "runs" / "quickstart" / "result.json").is_file()


PRUNE = """
import importlib.util
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vtprune_train import FastV, prune, unprune

for name in ("deepspeed", "datasets", "matplotlib", "tensorboard", "peft", "accelerate", "PIL", "psutil", "pyarrow"):
    assert importlib.util.find_spec(name) is None, name
sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2)
config = LlavaConfig(
    vision_config=CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=28, patch_size=14),
    text_config=LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=64),
    image_token_index=63,
)
model = LlavaForConditionalGeneration(config).eval()
ids = torch.tensor([[1, 63, 63, 63, 63, 5, 6]])
inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(1, 3, 28, 28))
dense = model(**inputs).logits
prune(model, FastV(layer=2, keep=0.5))
pruned = model(**inputs).logits
assert pruned.isfinite().all() and not torch.equal(pruned[:, -1], dense[:, -1])
assert model.generate(**inputs, min_new_tokens=3, max_new_tokens=3, do_sample=False).shape[1] == 10
assert torch.equal(unprune(model)(**inputs).logits, dense)
print("pruned")
"""


def test_the_core_alone_prunes_a_model(core, tmp_path):
    assert call(core / "python", "-c", PRUNE, cwd=tmp_path).stdout == "pruned\n"


@pytest.mark.parametrize(
    "command",
    [("train", "--config", "quickstart.yaml"), ("launch", "--config", "quickstart.yaml"), ("quickstart",)],
    ids=" ".join,
)
def test_a_command_without_its_extra_says_what_to_install(core, tmp_path, command):
    done = call(core / "vtprune", *command, cwd=tmp_path, expect=2)
    assert "Not installed: deepspeed, peft, " in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.endswith('\n  pip install "vtprune-train[train]"\n')


def test_help_needs_no_extra(core, tmp_path):
    assert "quickstart" in call(core / "vtprune", "--help", cwd=tmp_path).stdout
    assert "Maximum gradient norm" in call(core / "vtprune", "train", "--help", "train.clip", cwd=tmp_path).stdout
