"""The plug-ins for ms-swift and LLaMA-Factory in runs of the real packages (`make peers`), started as in the docs."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "ecosystem.md").read_text()
PYRAMIDDROP = json.dumps({"method": "pyramiddrop", "layers": [2, 4], "keep": [0.5, 0.25]})
LAUNCHER = "python -m vtprune_train.integrations.llama_factory"
CLOSE = 1e-4  # the losses are between 3 and 15, in float32

pytestmark = pytest.mark.slow
needs_swift = pytest.mark.skipif(find_spec("swift") is None, reason="ms-swift is not installed (make peers)")
needs_factory = pytest.mark.skipif(
    find_spec("llamafactory") is None, reason="LLaMA-Factory is not installed (make peers)"
)


@pytest.fixture(scope="module", params=["llava_next", "qwen2_5_vl"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    from tests.support.peer_data import SAVE, save_data

    folder = tmp_path_factory.mktemp(family)
    SAVE[family](folder / "model")
    save_data(folder)
    return folder


def documented(program):
    """The command of the docs page that contains ``program``, without the line breaks."""
    [command] = [body for body in re.findall(r"```shell\n(.*?)```", PAGE, re.DOTALL) if program in body]
    return command.replace("\\\n", " ").strip()


def start(command, folder, **variables):
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{ROOT}",
        "HF_HOME": str(folder / "hf"),
        "MODELSCOPE_CACHE": str(folder / "modelscope"),
        **variables,
    }
    return subprocess.Popen(
        command, shell=True, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def output_of(process, succeeds=True):
    output, _ = process.communicate(timeout=300)
    assert (process.returncode == 0) is succeeds, output[-4000:]
    return output


def compare(dense, packed, pruned):
    assert len(dense) == 4
    assert packed == pytest.approx(dense, abs=CLOSE)
    assert all(0 < loss < 20 for loss in pruned)
    assert pruned != pytest.approx(dense, abs=0.01)


def swift(family, **settings):
    """The documented command with settings of a tiny run; a setting may come twice, the last one counts."""
    settings = {
        "model": "model",
        "model_type": {"llava_next": "llava1_6_vicuna_hf"}.get(family, family),
        "template": {"llava_next": "llava1_6_vicuna_hf"}.get(family, family),
        "tuner_type": "full",
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "torch_dtype": "float32",
        "bf16": "false",
        "use_cpu": "true",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "split_dataset_ratio": 0,
        "use_hf": "true",
        "check_model": "false",
        **settings,
    }
    return documented("swift sft") + "".join(f" --{key} {value}" for key, value in settings.items())


def swift_losses(folder):
    [log] = folder.glob("*/logging.jsonl")
    return [record["loss"] for record in map(json.loads, log.read_text().splitlines()) if "loss" in record]


@needs_swift
def test_swift(folder, family):
    plain = re.sub(r"^VTPRUNE=\S+|--external_plugins \$\(.*?\)", "", swift(family, output_dir="dense"))
    runs = [start(plain, folder)]
    runs.append(start(swift(family, output_dir="packed"), folder))
    pruned = swift(family, output_dir="pruned").removeprefix("VTPRUNE=pack ")
    runs.append(start(pruned, folder, VTPRUNE=PYRAMIDDROP))
    for run in runs:
        output_of(run)
    compare(*(swift_losses(folder / name) for name in ("dense", "packed", "pruned")))


@needs_swift
@pytest.mark.parametrize("setting", ["packing", "padding_free"])
def test_swift_joined_rows(setting):
    """In this process: ms-swift joins rows only if FlashAttention is installed."""
    from swift.template import Template

    from tests.support.helpers import tiny_model
    from vtprune_train import pack
    from vtprune_train.integrations import ms_swift  # noqa: F401  (changes Template)

    template = SimpleNamespace(**{"packing": False, "padding_free": False, setting: True})
    with pytest.raises(ValueError, match="set --packing false --padding_free false"):
        Template.pre_forward_hook(template, pack(tiny_model()), (), {})


def factory(folder, family, name, **settings):
    """The documented command for a tiny run."""
    settings = {
        "model_name_or_path": "model",
        "template": {"qwen2_5_vl": "qwen2_vl"}.get(family, family),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset": "pictures",
        "dataset_dir": ".",
        "cutoff_len": 512,
        "output_dir": name,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        **settings,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return documented("llama_factory train").replace("config.yaml", f"{name}.yaml")


def factory_losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [record["loss"] for record in history if "loss" in record]


@needs_factory
def test_factory(folder, family):
    tuning = {"llava_next": "full", "qwen2_5_vl": "lora"}[family]
    names = ["dense", "packed", "pruned"]
    dense, packed, pruned = (factory(folder, family, f"{name}_{tuning}", finetuning_type=tuning) for name in names)
    runs = [
        start(dense.replace(LAUNCHER, "llamafactory-cli"), folder),
        start(packed, folder),
        start(pruned.removeprefix("VTPRUNE=pack "), folder, VTPRUNE=PYRAMIDDROP),
    ]
    for run in runs:
        output_of(run)
    folders = [folder / f"{name}_{tuning}" for name in names]
    compare(*map(factory_losses, folders))
    if tuning == "full":
        saved = [json.loads((folder / "config.json").read_text()) for folder in folders]
        assert ["pruning" in config for config in saved] == [False, False, True]


@needs_factory
def test_factory_with_two_processes(folder, family):
    if family != "llava_next":
        pytest.skip("two processes are tested with one family, to save time")
    packed, dense = (factory(folder, family, name, ddp_backend="gloo") for name in ("packed_2", "dense_2"))
    for command in (packed, dense.replace(LAUNCHER, "llamafactory-cli")):
        output_of(start(command, folder, FORCE_TORCHRUN="1", NPROC_PER_NODE="2"))
    assert factory_losses(folder / "packed_2") == pytest.approx(factory_losses(folder / "dense_2"), abs=CLOSE)


@needs_factory
def test_factory_joined_rows(folder, family):
    if family != "llava_next":
        pytest.skip("joined rows are tested with one family, to save time")
    command = factory(folder, family, "joined", packing=True, neat_packing=True)
    assert "attention_mask must be [rows, length]" in output_of(start(command, folder), succeeds=False)


@needs_factory
@pytest.mark.parametrize("name", ["USE_V1", "USE_RAY", "USE_MCA"])
def test_factory_refuses_what_would_train_the_unchanged_model(name, monkeypatch):
    from vtprune_train.integrations import llama_factory

    monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match=f"{name}=1: the model would not be packed or pruned"):
        llama_factory.main()


@needs_factory
def test_factory_refuses_its_web_interface(monkeypatch):
    from vtprune_train.integrations import llama_factory

    monkeypatch.setattr(sys, "argv", ["llama_factory", "webui"])
    with pytest.raises(ValueError, match="webui starts llamafactory-cli"):
        llama_factory.main()
