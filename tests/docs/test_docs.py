"""The code of the pages on the library and the ecosystem, run as it stands: only hub names become local folders."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import HALF, save_folder, save_images
from tests.support.harness_task import TASK, UTILS
from tests.support.trl_data import ANSWERS, chat_processor, collate, dataset_of, draw_image
from tests.support.trl_data import rows as trainer_rows
from vtprune_train import is_pruned
from vtprune_train.models.families import FAMILIES, UNSUPPORTED

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def blocks(page, language):
    return [body for kind, body in BLOCK.findall((ROOT / "docs" / page).read_text()) if kind == language]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint under the hub's name, a run, and the pictures that the pages name."""
    model = save_folder(tmp_path / "checkpoint", None)
    chat_processor().save_pretrained(model)
    save_folder(tmp_path / "runs" / "llava_next_pdrop", HALF)
    for path, name in zip(save_images(tmp_path / "drawn", 2), ("cat.jpg", "dog.jpg"), strict=True):
        path.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def local(code):
    return code.replace("llava-hf/llava-v1.6-vicuna-7b-hf", "checkpoint")


def test_generation_page(folder):
    names = {"torch": torch}
    first, second = blocks("generation.md", "python")
    exec(local(first), names)
    assert names["answers"].shape[0] == names["dense_answers"].shape[0] == 2
    assert not is_pruned(names["model"])
    names["model"] = type(names["model"]).from_pretrained("pruned").eval()
    exec(second, names)
    assert names["second_output"].shape[1] > names["ids"].shape[1]


def conversations():
    rows = []
    for seed in range(4):
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is shown ?"}]}
        said = {"role": "assistant", "content": [{"type": "text", "text": ANSWERS[seed]}]}
        rows.append({"images": [draw_image(seed)], "prompt": [user], "completion": [said]})
    return dataset_of(rows)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed (make ecosystem)")
def test_ecosystem_page(folder):
    """Its blocks one after the other, behind the first of the page on generation."""
    names = {"rows": trainer_rows(8), "collate": collate, "conversations": conversations()}
    exec(local(blocks("generation.md", "python")[0]), names)
    names["inputs"] = dict(names["inputs"])
    names["processor"] = chat_processor()
    *trainers, compiled = blocks("ecosystem.md", "python")
    for code in trainers:
        exec(code.replace("report_to=[]", "report_to=[], use_cpu=True"), names)
        assert is_pruned(names["model"])
    assert (folder / "runs" / "trainer" / "checkpoint-2").is_dir()
    assert (folder / "runs" / "lengths.npz").is_file()
    exec(compiled.replace("dynamic=True", 'backend="eager", dynamic=True'), names)
    assert names["model"](**names["inputs"]).logits.isfinite().all()


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed (make ecosystem)")
def test_preference_page(folder):
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is shown ?"}]}
    said = [[{"role": "assistant", "content": [{"type": "text", "text": answer}]}] for answer in ANSWERS[:2]]

    def prompts(**columns):
        return dataset_of([{"images": [draw_image(seed)], "prompt": [user], **columns} for seed in range(4)])

    names = {"preferences": prompts(chosen=said[0], rejected=said[1]), "prompts": prompts()}
    exec(local(blocks("generation.md", "python")[0]), names)
    names["processor"] = chat_processor()
    for code in blocks("preference.md", "python"):
        exec(code.replace("report_to=[]", "report_to=[], use_cpu=True"), names)
        assert is_pruned(names["model"]) and is_pruned(names["trainer"].ref_model)
        assert len([entry for entry in names["trainer"].state.log_history if "train_loss" in entry]) == 1


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed (make ecosystem)")
def test_lmms_eval_commands(folder):
    tasks = folder / "tasks" / "local_pictures"
    tasks.mkdir(parents=True)
    (tasks / "local_pictures.yaml").write_text(TASK)
    (tasks / "utils.py").write_text(UTILS)
    (tasks / "test.jsonl").write_text('{"images": ["cat.jpg"], "question": "what is shown ?", "answer": "yes"}\n')
    [lines] = [code for code in blocks("ecosystem.md", "bash") if code.startswith("lmms-eval")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    for line in lines.strip().splitlines():
        command = [str(Path(sys.executable).parent / "lmms-eval"), *shlex.split(line)[1:]]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        out = shlex.split(line)[shlex.split(line).index("--output_path") + 1]
        assert list((folder / out).rglob("*_results.json")), done.stdout[-3000:] + done.stderr[-3000:]


def test_the_page_on_extending_shows_what_is_tested():
    tested = ("data/test_user_readers.py", "models/families/test_user_family.py")
    sources = "".join((ROOT / "tests" / name).read_text() for name in tested)
    shown = [code for code in blocks("extending.md", "python") if "(Reader)" in code or "llava.FAMILY" in code]
    assert len(shown) == 2
    for code in shown:
        assert code.replace("\\n", "\\\\n") in sources


def test_the_table_of_families_is_complete():
    page = (ROOT / "docs" / "families.md").read_text()
    for family in FAMILIES:
        assert f"| {family.title} | `{family.model_class}` |" in page
    assert page.count("| not supported: ") == len(UNSUPPORTED)
    [code] = blocks("families.md", "python")
    file = ROOT / "vtprune_train" / "models" / "families" / "qwen2_vl.py"
    assert code in file.read_text(), "the page shows the smallest family as it stands in its file"
