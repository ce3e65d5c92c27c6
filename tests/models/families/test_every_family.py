"""Every family that the loop trains, from training to answers, by the documented install (without torchvision)."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPVisionModel

from tests.support.checkpoints import same_state
from tests.support.family_runs import FamilyRuns
from vtprune_train.cli import main
from vtprune_train.evaluation.answering import answers, load
from vtprune_train.models.families import FAMILIES
from vtprune_train.models.families.base import Loop
from vtprune_train.models.io.processors import open_processor

pytestmark = pytest.mark.slow

NAMES = [family.model_type for family in FAMILIES if isinstance(family.loop, Loop)]
QUESTION = "<image> what is shown here ?"
LORA = ("model.peft={kind: lora, r: 2}", "model.train={lora: 5e-3, projector: 5e-3}")


@pytest.fixture(scope="module", params=NAMES)
def runs(request, tmp_path_factory):
    runs = FamilyRuns(tmp_path_factory.mktemp(request.param), request.param)
    runs.model_type = request.param
    return runs


def say(capsys, *options):
    """What a command prints; it must not fail."""
    assert main([str(option) for option in options]) == 0
    return capsys.readouterr().out


def test_from_training_to_answers(runs, capsys):
    """Train, stop, resume, train an adapter, export, merge, generate, evaluate: the pixels and ids are the same."""
    runs.train("full", "train.max_steps=2", "run.stop_after=1")
    runs.train("full", "train.max_steps=2")
    runs.train("lora", "train.max_steps=1", *LORA)
    image = next((runs.folder / "data" / "images").iterdir())
    exports = {}
    for name, more in {"full": [], "lora": ["--merge"]}.items():
        run, out = runs.directory(name), runs.folder / f"export-{name}"
        say(capsys, "export", "--model", run, "--out", out, "--dtype", "float32", *more)
        answers = [
            say(capsys, "generate", "--model", model, "--image", image, "--prompt", QUESTION, "--max_new_tokens", 4)
            for model in (run, out)
        ]
        assert answers[0] == answers[1]
        exports[name] = out
    data = ["--data", runs.folder / "data" / "eval.json", "--images", runs.folder / "data" / "images", "--limit", 2]
    for name, out in exports.items():
        results = runs.folder / f"eval-{name}"
        say(capsys, "eval", "--model", out, *data, "--out", results, "--max_new_tokens", 3)
        assert json.loads((results / "results.json").read_text())["settings"]["method"]["method"] == "pyramiddrop"
    check_equal_inputs(runs, exports.values())
    ask_by_lmms_eval(exports["full"], image)
    if runs.model_type in ("llava", "llava_next"):
        convert_there_and_back(runs, exports["full"])


def ask_by_lmms_eval(folder, image):
    """The integration answers as the command does, where lmms-eval is installed."""
    if importlib.util.find_spec("lmms_eval") is None:
        return
    from vtprune_train.integrations.lmms_eval import VTPruneSimple

    model = VTPruneSimple(pretrained=str(folder), device="cpu")
    model.task_dict = {"task": {"test": [Image.open(image).convert("RGB")]}}
    arguments = ("what is shown here ?", {"max_new_tokens": 4}, lambda doc: [doc], 0, "task", "test")
    prompt = ([Image.open(image).convert("RGB")], "what is shown here ?")
    expected = answers(load(str(folder), device="cpu"), [prompt], max_new_tokens=4)
    assert model.generate_until([SimpleNamespace(args=arguments)]) == expected


def convert_there_and_back(runs, folder):
    """To the original format and back: the same weights and inputs."""
    clip = runs.folder / "clip"
    config = AutoConfig.from_pretrained(folder)
    CLIPVisionModel(config.vision_config).save_pretrained(clip)
    original, again = runs.folder / "original", runs.folder / "again"
    command = ["convert", "--vision_tower", str(clip), "--model"]
    assert main([*command, str(folder), "--to", "original", "--out", str(original)]) == 0
    assert main([*command, str(original), "--to", "hf", "--out", str(again)]) == 0
    one, two = (AutoModelForImageTextToText.from_pretrained(path) for path in (folder, again))
    same_state(one, two, torch.float32)
    check_equal_inputs(runs, [again])


def check_equal_inputs(runs, folders):
    """Training's image processor and tokenizer make what those of every folder make."""
    config = AutoConfig.from_pretrained(runs.model)
    before = open_processor(str(runs.model), config)
    image = Image.effect_noise((90, 40), 80).convert("RGB")
    text = f"user : {before.image_token} what is shown here ?"
    expected = before(images=[image], text=[text], return_tensors="pt")
    for folder in (*folders, runs.checkpoint("full") / "hf", runs.checkpoint("lora") / "hf"):
        made = open_processor(str(folder), config)(images=[image], text=[text], return_tensors="pt")
        assert made.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(made[key])), (folder, key)
