"""Every code block of every page: commands parse with the real parsers, settings load, Python runs.

Other tests run many of these commands for real (``test_inference_docs.py``, ``test_docs.py``, tests/cli); here no
block is left out, so that a page cannot name an option, a setting or a file that does not exist.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import TrainingArguments

from tests.support.checkpoints import save_folder, save_images
from tests.support.trl_data import chat_processor, collate, rows
from vtprune_train import unprune
from vtprune_train.cli import commands as cli
from vtprune_train.config.load import load_config
from vtprune_train.data.synthetic import write_dataset

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md")))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
MAKEFILE = (ROOT / "Makefile").read_text()

# Pages whose Python is run elsewhere.
RUN_ELSEWHERE = {
    "docs/generation.md": "tests/docs/test_docs.py",
    "docs/ecosystem.md": "tests/docs/test_docs.py",
    "docs/families.md": "tests/docs/test_docs.py",
    "docs/inference.md": "tests/docs/test_inference_docs.py",
    "docs/methods/own.md": "tests/cli/test_methods.py",
    "docs/preference.md": "tests/docs/test_docs.py",
    "docs/peft.md": "tests/models/io/test_peft.py",
    "docs/training.md": "tests/training/loop/test_callbacks.py",
}
SHELL = ("cd", "source", "lmms-eval", "sbatch", "accelerate")  # not ours to parse


def blocks(page, language):
    return [body for kind, body in BLOCK.findall((ROOT / page).read_text()) if kind == language]


def command_lines():
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                    words = words[1:]
                if words:
                    yield pytest.param(words, id=f"{page}: {' '.join(words)[:80]}")


@pytest.fixture
def parsed(monkeypatch):
    """The arguments that a command was parsed to, in place of its run."""
    seen = []

    def take(arguments):
        seen.append(arguments)
        return 0

    for name in ("run_train", "_run_command", "_launch"):
        monkeypatch.setattr(cli, name, take)
    return seen


def train_arguments(words):
    parser = cli.TrainParser(prog="train.py", add_help=False)
    cli.add_train_arguments(parser)
    return parser.parse_intermixed_args(words)


def check_settings(arguments):
    """The settings of a training command load, unless it names a file of the user's."""
    if arguments.config is None or arguments.config in ("my.yaml", "FILE"):
        return
    config = load_config(arguments.config, arguments.overrides)
    assert config.run.name


@pytest.mark.parametrize("words", command_lines())
def test_commands_parse(words, parsed, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "searched.yaml").write_text("pruning: {method: fastv}\n")  # what `vtprune search` writes
    program, *rest = words
    if "train.py" in words and program in ("deepspeed", "torchrun", "python"):
        check_settings(train_arguments(words[words.index("train.py") + 1 :]))
    elif program == "vtprune" and "--help" in rest:
        with pytest.raises(SystemExit) as exit_code:
            cli.main(rest)
        assert exit_code.value.code == 0
    elif program == "vtprune" and rest[0] == "launch":
        check_settings(train_arguments(rest[rest.index("--config") :]))
    elif program == "vtprune":
        assert cli.main(rest) == 0
        if rest[0] == "train":
            check_settings(parsed[-1])
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", MAKEFILE, re.MULTILINE), f"no target {rest[0]}"
    elif program == "python" or program.startswith("scripts/"):
        script, *options = words if program.startswith("scripts/") else rest
        source = with_packages((ROOT / script).read_text())
        for option in options:
            if option.startswith("--") and script.endswith(".py"):
                assert f'"{option.partition("=")[0]}"' in source, f"{script} has no {option}"
    elif program == "pip":
        assert all((ROOT / word).is_file() for word in rest if word.endswith(".txt"))
    else:
        assert program in SHELL, f"{program}: a program that no test knows"


def with_packages(source):
    """The text of a script, and of the packages beside it that it imports, which may add options."""
    names = dict.fromkeys(re.findall(r"^from (\w+)\.", source, re.MULTILINE))
    folders = [ROOT / "scripts" / name for name in names if (ROOT / "scripts" / name).is_dir()]
    return source + "".join(file.read_text() for folder in folders for file in sorted(folder.glob("*.py")))


def yaml_blocks():
    for page in PAGES:
        for number, block in enumerate(blocks(page, "yaml")):
            yield pytest.param(block, id=f"{page}: {number}")


@pytest.mark.parametrize("block", yaml_blocks())
def test_settings_load(block, tmp_path, monkeypatch):
    """Each block is valid by itself if it names a base, else beside the keys of the quickstart's recipe that it does
    not set."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mixtures").mkdir()
    (tmp_path / "mixtures" / "charts.yaml").write_text("- {path: charts.json}\n")
    tree = yaml.safe_load(block)
    if "method" in tree.get("pruning", {}) and ":" in str(tree["pruning"]["method"]):
        code, _ = blocks("docs/methods/own.md", "python")
        (tmp_path / "outliers.py").write_text(code)
    (tmp_path / "block.yaml").write_text(block)
    if tree.pop("base", None) is not None:
        assert load_config("block.yaml").run.name == tree["run"]["name"]
        return
    base = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    for section, values in tree.items():
        if section == "pruning":
            base[section] = values
        elif isinstance(values, dict) and section in base:
            base[section] = {**base[section], **values}
        else:
            base[section] = values
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(base))
    config = load_config(str(tmp_path / "whole.yaml"))
    sys.modules.pop("outliers", None)  # other tests have their own file of this name
    for section in tree:
        assert getattr(config, section) is not None


def test_every_page_with_python_is_run():
    pages = ("index", "prune", "show", "data", "data_format", "extending", "api")
    here = {"README.md", *(f"docs/{page}.md" for page in pages)}
    for page in PAGES:
        if blocks(page, "python"):
            assert page in here or page in RUN_ELSEWHERE, f"no test runs the Python of {page}"
    for page, test in RUN_ELSEWHERE.items():
        assert Path(page).name in (ROOT / test).read_text()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint under the hub's name, and an image."""
    save_folder(tmp_path / "checkpoint", None)
    chat_processor().save_pretrained(tmp_path / "checkpoint")
    save_images(tmp_path / "drawn", 1)[0].rename(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def local(code):
    """The code for a local checkpoint of six layers on the CPU."""
    code = code.replace("llava-hf/llava-v1.6-vicuna-7b-hf", "checkpoint").replace(', device_map="auto"', "")
    return code.replace("layers=(8, 16, 24)", "layers=(1, 2, 4)")


def test_the_library_pages(folder, capsys):
    names = {}
    for block in blocks("docs/prune.md", "python"):
        exec(local(block), names)
    assert "pruned" in {path.name for path in folder.iterdir()}
    assert capsys.readouterr().out.strip()
    inputs = {**names, "labels": names["labels"], "images": names["image"], "texts": "<image> what is shown ?"}
    arguments = TrainingArguments("runs", max_steps=1, report_to=[], use_cpu=True, remove_unused_columns=False)
    inputs |= {"arguments": arguments, "dataset": rows(4), "collate": collate}
    for block in blocks("README.md", "python"):
        exec(local(block).replace("labels=labels", 'labels=inputs["input_ids"]'), inputs)
    assert inputs["trainer"].state.global_step == 1
    model, processor = names["again"], names["processor"]
    [shown] = blocks("docs/show.md", "python")
    unprune(model)
    exec(shown, {"model": model, "processor": processor, "image": names["image"], "prompt": "<image> what is shown ?"})
    assert Image.open("kept.png").width > 100


def test_the_index(folder):
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    model = LlavaNextForConditionalGeneration.from_pretrained("checkpoint")
    processor = AutoProcessor.from_pretrained("checkpoint")
    inputs = processor(images=Image.open("cat.jpg").convert("RGB"), text="<image> what ?", return_tensors="pt")
    [code] = blocks("docs/index.md", "python")
    exec(local(code), {"model": model, "inputs": inputs, "labels": inputs["input_ids"]})
    assert any(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_parquet_example(folder):
    [code] = blocks("docs/data.md", "python")
    exec(code, {})
    assert (folder / "train.parquet").stat().st_size > 0


def test_the_loop_from_python(tmp_path):
    """The API page's example, in a process of its own with the quickstart's data."""
    [code] = blocks("docs/api.md", "python")
    write_dataset(tmp_path / "runs" / "data" / "quickstart", num_train=40, num_eval=4, seed=0)
    (tmp_path / "script.py").write_text(f"{code}\nraise SystemExit(exit_code)\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert len((tmp_path / "runs" / "from_python" / "metrics.jsonl").read_text().splitlines()) == 3
