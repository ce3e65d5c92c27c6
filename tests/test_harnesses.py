"""Evaluation harnesses on a pruned checkpoint: lmms-eval through its plug-in mechanism, VLMEvalKit's interface."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from checkpoints import HALF, save_folder, save_pictures
from PIL import Image

from vtprune_train.inference.chatting import answers, load

needs_lmms = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed (make ecosystem)"
)
TASK = """\
task: local_pictures
dataset_path: json
dataset_kwargs:
  data_files:
    test: test.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 6
  do_sample: false
  until:
    - "\\n\\n"
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 0.0
"""
UTILS = """\
from PIL import Image


def doc_to_visual(doc):
    return [Image.open(path).convert("RGB") for path in doc["images"]]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""
QUESTIONS = ["what is shown here ?", "is the dog red ?", "what is on the left ?", "two cat ?", "what is a dog ?"]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A model, a local task whose references are the pruned model's own answers but for the last, and those answers."""
    folder = tmp_path_factory.mktemp("harness")
    model = save_folder(folder / "model")
    pictures = [str(path) for path in save_pictures(folder / "pictures")]
    images = [pictures[:1], pictures[1:2], pictures[2:3], pictures[3:5], []]
    loaded = load(str(model))
    prompts = [
        ([Image.open(path).convert("RGB") for path in own], text) for own, text in zip(images, QUESTIONS, strict=True)
    ]
    said = [answers(loaded, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    rows = [
        {"images": own, "question": text, "answer": answer if number < 4 else "never said"}
        for number, (own, text, answer) in enumerate(zip(images, QUESTIONS, said, strict=True))
    ]
    tasks = folder / "tasks" / "local_pictures"
    tasks.mkdir(parents=True)
    (tasks / "local_pictures.yaml").write_text(TASK)
    (tasks / "utils.py").write_text(UTILS)
    (tasks / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, model, said


def lmms_eval(folder, model_args, *more):
    """Run the real command; its exit code is 0 even after a failure, so the results file is what counts."""
    out = folder / f"out-{len(list(folder.glob('out-*')))}"
    command = [
        sys.executable, "-m", "lmms_eval", "eval", "--model", "vtprune", "--model_args", model_args,
        "--tasks", "local_pictures", "--include_path", str(folder / "tasks"), "--output_path", str(out),
        "--log_samples", "--device", "cpu", *more,
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline}, timeout=300)
    files = list(out.rglob("*_results.json"))
    assert files, result.stdout[-3000:] + result.stderr[-3000:]
    samples = next(out.rglob("*_samples_*.jsonl"))
    answered = [json.loads(line) for line in samples.read_text().splitlines()]
    answered.sort(key=lambda row: row["doc_id"])
    score = json.loads(files[0].read_text())["results"]["local_pictures"]["exact_match,none"]
    return score, [row["filtered_resps"] for row in answered]


@needs_lmms
@pytest.mark.parametrize("more", [["--batch_size", "3"], ["--force_simple"]], ids=["chat", "simple"])
def test_lmms_eval_answers_like_vtprune(task, more):
    folder, model, said = task
    score, answered = lmms_eval(folder, f"pretrained={model}", *more)
    assert [answer[0] if isinstance(answer, list) else answer for answer in answered] == said
    assert score == pytest.approx(0.8)


@needs_lmms
def test_lmms_eval_takes_a_method(task):
    folder, model, said = task
    _, dense = lmms_eval(folder, f"pretrained={model},method=none")
    dense = [answer[0] if isinstance(answer, list) else answer for answer in dense]
    assert dense[-1] == said[-1], "text alone loses nothing"
    assert dense != said
    _, dropped = lmms_eval(folder, f"pretrained={model},method=pyramiddrop,layers=2/4,keep=0.5/0.25")
    assert [answer[0] if isinstance(answer, list) else answer for answer in dropped] == said


@needs_lmms
def test_lmms_eval_settings_without_a_method_are_refused(task):
    from vtprune_train.integrations.lmms_eval import VTPruneChat

    with pytest.raises(ValueError, match=r"keep=0\.5 has no effect with the saved method"):
        VTPruneChat(pretrained=str(task[1]), keep=0.5)


@pytest.fixture
def vlmevalkit(monkeypatch):
    """VLMEvalKit's BaseModel, or where it is not installed (it is not on PyPI) the part of it that is relied on."""
    if importlib.util.find_spec("vlmeval") is None:
        base = types.ModuleType("vlmeval.vlm.base")

        class BaseModel:
            INTERLEAVE = False
            allowed_types = ("text", "image", "video")

            def generate(self, message, dataset=None):
                return self.generate_inner(message, dataset)

        base.BaseModel = BaseModel
        for name in ("vlmeval", "vlmeval.vlm"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "vlmeval.vlm.base", base)
    return importlib.import_module("vtprune_train.integrations.vlmevalkit")


def test_vlmevalkit_interface(task, vlmevalkit):
    folder, model, said = task
    rows = [json.loads(line) for line in (folder / "tasks/local_pictures/test.jsonl").read_text().splitlines()]
    kit = vlmevalkit.VTPrune(model_path=str(model), max_new_tokens=6)
    for row, answer in zip(rows, said, strict=True):
        message = [{"type": "image", "value": path} for path in row["images"]]
        assert kit.generate([*message, {"type": "text", "value": row["question"]}], dataset="any") == answer
    dropped = vlmevalkit.VTPrune(model_path=str(model), method=HALF, max_new_tokens=6)
    text = [{"type": "text", "value": QUESTIONS[0]}]
    picture = {"type": "image", "value": rows[0]["images"][0]}
    assert dropped.generate([picture, *text]) == said[0]
    with pytest.raises(ValueError, match="a message part of type 'video'"):
        kit.generate([{"type": "video", "value": "a.mp4"}])
    with pytest.raises(ValueError, match=r"missing\.png"):
        kit.generate([{"type": "image", "value": str(Path("missing.png"))}, *text])
