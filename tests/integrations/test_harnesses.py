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
import torch
from PIL import Image

from tests.support.checkpoints import HALF, save_folder, save_images
from tests.support.families import family_model, tokenizer
from tests.support.harness_task import TASK, UTILS
from tests.support.helpers import tiny_processor
from tests.support.video_runs import VideoSetup
from tests.support.videos import moving_frames, write_video
from vtprune_train.evaluation.answering import answers, load
from vtprune_train.evaluation.videos import open_video
from vtprune_train.models.families import FAMILIES, family_of_type
from vtprune_train.models.io.processors import build_processor

pytestmark = pytest.mark.slow

needs_lmms = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed (make ecosystem)"
)
QUESTIONS = ["what is shown here ?", "is the dog red ?", "what is on the left ?", "two cat ?", "what is a dog ?"]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A model, a local task whose references are the pruned model's own answers but for the last, and those answers."""
    folder = tmp_path_factory.mktemp("harness")
    model = save_folder(folder / "model")
    pictures = [str(path) for path in save_images(folder / "pictures")]
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


def lmms_eval(folder, model_args, *more, launcher=(sys.executable,)):
    """Run the real command; its exit code is 0 even after a failure, so the results file is what counts."""
    out = folder / f"out-{len(list(folder.glob('out-*')))}"
    command = [
        *launcher, "-m", "lmms_eval", "eval", "--model", "vtprune", "--model_args", model_args,
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
    assert [row["doc_id"] for row in answered] == list(range(len(QUESTIONS)))  # each once
    assert "has no attribute 'manifest'" not in result.stderr
    score = json.loads(files[0].read_text())["results"]["local_pictures"]["exact_match,none"]
    return score, [row["filtered_resps"] for row in answered]


@needs_lmms
@pytest.mark.parametrize("more", [["--batch_size", "3"], ["--force_simple"]], ids=["chat", "simple"])
def test_lmms_eval_answers_like_vtprune(task, more):
    folder, model, said = task
    score, answered = lmms_eval(folder, f"pretrained={model}", *more)
    assert [answer[0] if isinstance(answer, list) else answer for answer in answered] == said
    assert score == pytest.approx(0.8)


LAUNCHERS = {
    "accelerate": (
        "accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no "
        "--main_process_port 0"
    ),
    "torchrun": "torch.distributed.run --standalone --nproc_per_node 2",
}


@needs_lmms
@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_lmms_eval_on_two_processes_answers_like_one(task, launcher):
    """Five documents over two processes, with the batch size left to the program."""
    folder, model, said = task
    more = ["--batch_size", "auto", "--max_batch_size", "2"]
    score, answered = lmms_eval(
        folder, f"pretrained={model}", *more, launcher=(sys.executable, "-m", *LAUNCHERS[launcher].split())
    )
    assert [answer[0] if isinstance(answer, list) else answer for answer in answered] == said
    assert score == pytest.approx(0.8)


@needs_lmms
def test_lmms_eval_gives_a_task_that_names_no_length_its_own(task):
    """And max_gen_toks is the same setting by another name."""
    folder, model, said = task
    path = folder / "tasks" / "local_pictures" / "local_pictures.yaml"
    long = answers(load(str(model)), [([], QUESTIONS[4])], max_new_tokens=1024)[0]
    try:
        path.write_text(TASK.replace("  max_new_tokens: 6\n", ""))
        _, whole = lmms_eval(folder, f"pretrained={model}")
        _, same = lmms_eval(folder, f"pretrained={model}", "--gen_kwargs", "max_gen_toks=6")
    finally:
        path.write_text(TASK)
    assert len(long.split()) > 20
    last = whole[-1][0] if isinstance(whole[-1], list) else whole[-1]
    assert last == long
    assert [answer[0] if isinstance(answer, list) else answer for answer in same] == said


@needs_lmms
@pytest.mark.parametrize(
    ("asked", "keywords", "stops"),
    [
        ({}, {"max_new_tokens": 1024, "do_sample": False}, []),
        ({"max_gen_toks": 7, "until": "\n"}, {"max_new_tokens": 7, "do_sample": False}, ["\n"]),
        ({"max_new_tokens": 7, "max_gen_toks": 7}, {"max_new_tokens": 7, "do_sample": False}, []),
        ({"temperature": 0, "top_p": 0.9, "do_sample": True}, {"max_new_tokens": 1024, "do_sample": False}, []),
        (
            {"temperature": 0.5, "top_k": 3},
            {"max_new_tokens": 1024, "do_sample": True, "temperature": 0.5, "top_k": 3}, [],
        ),
        ({"do_sample": True, "top_p": 0.9}, {"max_new_tokens": 1024, "do_sample": True, "top_p": 0.9}, []),
        ({"do_sample": False, "temperature": 0.5}, {"max_new_tokens": 1024, "do_sample": False}, []),
        (
            {"repetition_penalty": 1.2, "num_beams": 2, "no_repeat_ngram_size": 3, "min_new_tokens": 2, "seed": 1},
            {
                "max_new_tokens": 1024, "do_sample": False, "repetition_penalty": 1.2, "num_beams": 2,
                "no_repeat_ngram_size": 3, "min_new_tokens": 2,
            },
            [],
        ),
        ({"stop_sequences": ["a", "b"], "image_aspect_ratio": "original"}, {"max_new_tokens": 1024, "do_sample": False},
         ["a", "b"]),
    ],
)  # fmt: skip
def test_lmms_eval_honours_every_generation_setting(asked, keywords, stops):
    from vtprune_train.integrations.lmms_eval import _generation

    before = dict(asked)
    assert _generation(asked) == (keywords, stops)
    assert asked == before


@needs_lmms
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"max_new_tokens": 7, "max_gen_toks": 8}, "are names of the same setting with different values"),
        ({"num_return_sequences": 2}, "generation_kwargs num_return_sequences=2 is not supported"),
        ({"max_agentic_steps": 3}, "generation_kwargs max_agentic_steps=3 is not supported"),
        ({"temperature_": 1}, "generation_kwargs temperature_=1 is not supported"),
        ({"image_aspect_ratio": "pad"}, "--gen_kwargs image_aspect_ratio=original to override"),
        ({"visual_cot": True}, "generation_kwargs visual_cot=True"),
    ],
)
def test_lmms_eval_refuses_other_generation_settings_by_name(asked, said):
    from vtprune_train.integrations.lmms_eval import _generation

    with pytest.raises(ValueError, match=said):
        _generation(asked)


@needs_lmms
def test_lmms_eval_takes_images_and_videos_by_name_and_nothing_else(tmp_path):
    from vtprune_train.integrations.lmms_eval import _open_visuals

    image = Image.new("RGB", (9, 7), "red")
    image.save(tmp_path / "a.png")
    takes = build_processor(family_model("qwen2_vl").config, tokenizer())
    named, given = _open_visuals([str(tmp_path / "a.png"), image.convert("L")], takes, "t", 3)
    assert named.tobytes() == image.tobytes() and given.mode == "RGB"
    path = str(write_video(tmp_path / "a.mp4", moving_frames(12), fps=4))
    [video] = _open_visuals([path], takes, "t", 3)
    assert video.frames.shape == (6, 48, 64, 3), "two frames per second"
    (tmp_path / "b.mp4").write_bytes(b"video")
    without = tiny_processor()
    for wrong, processor, said in (
        (str(tmp_path / "b.mp4"), takes, r"b\.mp4 cannot be read"),
        (path, without, "LlavaNext models do not take videos"),
        ([image], takes, "not list"),
    ):
        with pytest.raises(ValueError, match=rf"task t, document 3: .*{said}"):
            _open_visuals([wrong], processor, "t", 3)


@needs_lmms
def test_lmms_eval_halves_an_automatic_batch_when_memory_runs_out(task, monkeypatch):
    import vtprune_train.integrations.lmms_eval as integration

    sizes = []

    def limited(loaded, prompts, **_):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("no memory left")
        return [f"answer {len(prompts)}"] * len(prompts)

    monkeypatch.setattr(integration, "answers", limited)
    monkeypatch.setattr(integration.VTPruneSimple, "prompt", lambda self, request: ([], "what ?"))
    requests = [types.SimpleNamespace(args=("what ?", {"until": ["."]}, None, n, "t", "test")) for n in range(7)]
    answered = integration.VTPruneSimple(pretrained=str(task[1]), device="cpu", batch_size="auto", max_batch_size=6)
    assert len(answered.generate_until(requests)) == 7
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1, 1]
    fixed = integration.VTPruneSimple(pretrained=str(task[1]), device="cpu", batch_size=4)
    with pytest.raises(torch.OutOfMemoryError):
        fixed.generate_until(requests)
    with pytest.raises(ValueError, match="--batch_size=many is neither a number above 0 nor auto"):
        integration.VTPruneSimple(pretrained=str(task[1]), device="cpu", batch_size="many")


@needs_lmms
@pytest.mark.parametrize("first", ["vtprune_train.integrations.lmms_eval", "lmms_eval.models"])
def test_lmms_eval_may_be_imported_before_or_after(first):
    code = (
        f"import importlib; importlib.import_module({first!r})\n"
        "from lmms_eval.models import get_model; print(get_model('vtprune').__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout.split()[-1:] == ["VTPruneChat"], result.stderr[-2000:]
    assert "manifest" not in result.stderr


@needs_lmms
def test_lmms_eval_puts_one_process_on_each_gpu(monkeypatch):
    from vtprune_train.integrations.lmms_eval import _device_of_rank

    def accelerator(kind, local, processes=2):
        return types.SimpleNamespace(
            num_processes=processes, local_process_index=local, device=types.SimpleNamespace(type=kind)
        )

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [_device_of_rank("cuda", accelerator("cuda", rank)) for rank in (0, 1)] == ["cuda:0", "cuda:1"]
    assert _device_of_rank("cuda:1", accelerator("cuda", 0, processes=1)) == "cuda:1"
    assert _device_of_rank("auto", accelerator("cpu", 1)) == "cpu"
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU, there are 2"):
        _device_of_rank("cuda", accelerator("cuda", 2))
    with pytest.raises(ValueError, match="accelerate launch --cpu"):
        _device_of_rank("cpu", accelerator("cuda", 0))
    with pytest.raises(ValueError, match="these 2 processes have no GPU"):
        _device_of_rank("cuda", accelerator("cpu", 0))


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


@pytest.fixture
def family(tmp_path):
    """The path of a family outside the package."""
    file = tmp_path / f"{tmp_path.name}.py"  # each module's name only once
    file.write_text(
        "from dataclasses import replace\n"
        "from vtprune_train.models.families import llava\n"
        'FAMILY = replace(llava.FAMILY, title="Kit", model_type="kit", model_class="Kit")\n'
    )
    before = list(FAMILIES)
    yield f"{file}:FAMILY"
    FAMILIES[:] = before


def type_is_known(*_, **__):
    assert family_of_type("kit") is not None, "the family is registered before the model is loaded"
    return types.SimpleNamespace(model=types.SimpleNamespace(device="cpu"), processor=None)


def test_vlmevalkit_adds_a_family(vlmevalkit, family, monkeypatch):
    monkeypatch.setattr(vlmevalkit, "load", type_is_known)
    assert vlmevalkit.VTPrune(model_path="x", family=family).generation == {"max_new_tokens": 512}


@needs_lmms
def test_lmms_eval_adds_a_family(family, monkeypatch):
    import vtprune_train.integrations.lmms_eval as integration

    monkeypatch.setattr(integration, "load", type_is_known)
    assert integration.VTPruneSimple(pretrained="x", family=family).device == "cpu"


def test_vlmevalkit_takes_videos(vlmevalkit, tmp_path):
    setup = VideoSetup("qwen2_vl", tmp_path)
    setup.parts().processor.save_pretrained(tmp_path / "model")
    kit = vlmevalkit.VTPrune(model_path=str(tmp_path / "model"), method=HALF, max_new_tokens=6, num_frames=4)
    path = tmp_path / "clips" / "videos" / "0.mp4"
    said = kit.generate([{"type": "video", "value": str(path)}, {"type": "text", "value": QUESTIONS[0]}])
    video = open_video(path, kit.loaded.processor)
    assert kit.VIDEO_LLM and len(video.frames) == 4
    assert said == answers(kit.loaded, [([video], f"<video>\n{QUESTIONS[0]}")], max_new_tokens=6)[0]


def test_vlmevalkit_interface(task, vlmevalkit):
    folder, model, said = task
    rows = [json.loads(line) for line in (folder / "tasks/local_pictures/test.jsonl").read_text().splitlines()]
    kit = vlmevalkit.VTPrune(model_path=str(model), max_new_tokens=6)
    for row, answer in zip(rows, said, strict=True):
        message = [{"type": "image", "value": path} for path in row["images"]]
        assert kit.generate([*message, {"type": "text", "value": row["question"]}], dataset="any") == answer
    dropped = vlmevalkit.VTPrune(model_path=str(model), method=HALF, max_new_tokens=6)
    text = [{"type": "text", "value": QUESTIONS[0]}]
    image = {"type": "image", "value": rows[0]["images"][0]}
    assert dropped.generate([image, *text]) == said[0]
    with pytest.raises(ValueError, match="message part of type 'audio'"):
        kit.generate([{"type": "audio", "value": "a.wav"}])
    assert not kit.VIDEO_LLM
    with pytest.raises(ValueError, match="LlavaNext models do not take videos"):
        kit.generate([{"type": "video", "value": "a.mp4"}])
    with pytest.raises(ValueError, match=r"missing\.png"):
        kit.generate([{"type": "image", "value": str(Path("missing.png"))}, *text])
