"""A model answers prompts as training's own evaluation says: the same ids in both, from a real run's checkpoint."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from tests.support.runner import Runs
from tests.support.tokenizers_made import TOKENIZERS
from vtprune_train import prune
from vtprune_train.cli import main
from vtprune_train.config.load import load_config
from vtprune_train.evaluation.answering import content_of, load_processor, model_config, write_prompt
from vtprune_train.training.loop.data import build_collator
from vtprune_train.training.loop.evaluate import evaluate
from vtprune_train.training.loop.parts import build_parts, training_cost

pytestmark = pytest.mark.slow

WORDS = ["red cat", "two dogs", "blue bird", "the left one", "a right one", "no, five"]
KINDS = {
    "1 turn, image first": (["<image>\nwhat is {n}?"], 1),
    "1 turn, image in the middle": (["what is in <image>at {n} ?"], 1),
    "3 turns, image first": (["<image>\nwhich is {n}?", "and {n} now?", " then {n}?"], 1),
    "3 turns, images in the middle": (["is {n} here?", "and in <image> of {n}?", "or {n}<image>?"], 2),
}


def write_records(folder: Path) -> None:
    """A file of each kind, and ``train.json`` with all of them."""
    rng = np.random.default_rng(1)
    everything = []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for kind, (questions, pictures) in KINDS.items():
        records = []
        for number in range(6):
            names = [f"{len(everything) + number}-{place}.png" for place in range(pictures)]
            for name in names:
                pixels = rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / name)
            turns = []
            for place, question in enumerate(questions):
                turns.append({"from": "human", "value": question.format(n=f"number {number}")})
                turns.append({"from": "gpt", "value": WORDS[(number * 5 + place) % len(WORDS)]})
            records.append({"id": f"{kind}-{number}", "image": names, "conversations": turns})
        (folder / f"{kind}.json").write_text(json.dumps(records))
        everything += records
    (folder / "train.json").write_text(json.dumps(everything))


@pytest.fixture(scope="module", params=["gpt2", "llama-legacy", "llama-new", "llama-new, LLaVA's ids"])
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    runs = Runs(folder)
    write_records(folder / "data")
    kind, _, llava = request.param.partition(", ")
    TOKENIZERS[kind]().save_pretrained(folder / "tokenizer")
    if kind == "llama-legacy":  # the class does not save it
        settings = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
        (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({**settings, "legacy": True}))
    done = runs.run(
        "run", f"model.tokenizer={folder / 'tokenizer'}", "model.config.text_config.vocab_size=800",
        "pruning={method: none}", "data.eval=[]", "train.global_batch_size=12", "train.epochs=45", "data.workers=0",
        f"data.tokenization={'llava' if llava else 'processor'}",
    )  # fmt: skip
    return request.param, folder, runs.checkpoint("run") / "hf", done.stdout + done.stderr


def collator(exported, out, which, *settings):
    """The model of a checkpoint as the loop opens it, and its data."""
    config = load_config(str(exported.parent / "config.yaml"), [f"run.output_dir={out}", *settings])
    model = config.model.model_copy(update={"path": str(exported), "config": None, "tokenizer": None})
    config = config.model_copy(update={"model": model})
    config.run_dir.mkdir(parents=True)
    parts = build_parts(config)
    return parts, build_collator(config, parts, training_cost(config, parts.model.config), None, which)


def training_says(exported, data, out):
    """What training's own evaluation makes of a checkpoint and a file."""
    parts, collate = collator(exported, out, "eval", f"data.eval=[{{path: '{data}', images: images}}]")
    settings = {"max_tokens": 600, "device": torch.device("cpu"), "workers": 0, "mark": lambda _: None}
    return evaluate(prune(parts.model, None), collate, **settings)


def test_evaluations_are_equal(trained, tmp_path, capsys):
    name, folder, exported, _ = trained
    print(f"\n{name:<28}{'answers':>8}{'training':>10}{'vtprune eval':>14}")
    for kind in KINDS:
        data = folder / "data" / f"{kind}.json"
        ours = training_says(exported, data.name, tmp_path / kind)
        command = ["eval", "--model", str(exported), "--data", str(data), "--images", str(data.parent / "images")]
        assert main([*command, "--out", str(tmp_path / f"eval {kind}"), "--max_new_tokens", "12"]) == 0
        lines = (tmp_path / f"eval {kind}" / "samples.jsonl").read_text().splitlines()
        exact = [json.loads(line)["runs"]["dense"]["exact"] for line in lines]
        with capsys.disabled():
            print(f"{kind:<28}{len(exact):>8}{ours['exact_match']:>10.1%}{np.mean(exact):>14.1%}")
        assert np.mean(exact) == pytest.approx(ours["exact_match"]) and np.mean(exact) > 0.5


def test_ids_from_the_export_are_those_of_training(trained, tmp_path):
    """Of plain transformers' processor and of the commands', in the checkpoint and in what `export` makes of it."""
    _, _, exported, _ = trained
    parts, collate = collator(exported, tmp_path / "again", "train")
    assert main(["export", "--model", str(exported), "--out", str(tmp_path / "export"), "--dtype", "float32"]) == 0
    for place in (exported, tmp_path / "export"):
        assert (place / "chat_template.jinja").is_file()
        plain = AutoProcessor.from_pretrained(place)
        own = load_processor(str(place), model_config(str(place)))
        assert plain.chat_template == own.chat_template == parts.processor.chat_template
        for sample in range(0, len(collate.index), 3):
            record = collate.index.record(sample)
            batch = collate([sample])
            images = [Image.open(file.source) for file in collate.index.files(sample, record)]
            messages = [{"role": turn.role, "content": turn.text} for turn in record.turns]
            text = plain.apply_chat_template(messages)
            ids = plain(images=images, text=text, add_special_tokens=False).input_ids[0]
            assert ids == batch.input_ids.tolist()
            left = iter(images)
            parts_of_it = [{"role": turn.role, "content": as_parts(turn.text, left)} for turn in record.turns]
            whole = plain.apply_chat_template(parts_of_it, tokenize=True, return_dict=True)
            assert whole["input_ids"][0] == ids
            prompt = write_prompt(own, content_of(own), len(images), record.turns[:-1])
            assert text.startswith(prompt)


def as_parts(text, images):
    parts = []
    for number, part in enumerate(text.split("<image>")):
        if number:
            parts.append({"type": "image", "image": next(images)})
        if part:
            parts.append({"type": "text", "text": part})
    return parts


def test_a_sample_is_shown_before_the_first_step(trained):
    _, _, _, said = trained
    assert "supervised (between [[ and ]]):\n" in said
    assert re.search(r"<s>\s?USER: <image> x \d+\s+what is number 0\? ASSISTANT:\[\[ ?red cat</s>\]\]\n", said)
