"""A model that the project's own loop trained with PyramidDrop: plain transformers, vtprune generate, TRL."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

from tests.support.runner import ROOT, Runs
from vtprune_train import PyramidDrop, is_pruned, prune
from vtprune_train.cli import main
from vtprune_train.data.synthetic import write_dataset
from vtprune_train.models.patch import method_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The quickstart's model, data and settings, for 40 of its steps."""
    folder = tmp_path_factory.mktemp("trained")
    runs = Runs(folder)
    shutil.copy(ROOT / "configs" / "quickstart.yaml", runs.config)
    data = folder / "quickstart"
    write_dataset(data, num_train=1280, num_eval=8, seed=0)
    settings = [
        f"data.root={data}", "train.max_steps=40", "train.eval_every=null", "train.eval_show=0", "train.save_every=40",
    ]  # fmt: skip
    runs.run("quick", *settings)
    return folder / "runs" / "quick", data


def image_of(data):
    record = json.loads((data / "eval.json").read_text())[0]
    return data / "images" / record["image"], record


def test_plain_transformers_opens_it_dense(trained):
    run, data = trained
    folder = run / "checkpoints" / "step_00000040" / "hf"
    model = LlavaNextForConditionalGeneration.from_pretrained(folder).eval()
    assert not is_pruned(model)
    path, _ = image_of(data)
    inputs = AutoProcessor.from_pretrained(folder)(
        images=Image.open(path).convert("RGB"), text="<image> what colour ?", return_tensors="pt"
    )
    dense = model(**inputs).logits[0, -1]
    assert dense.isfinite().all()
    assert isinstance(method_of(prune(model)), PyramidDrop)
    dropped = model(**inputs).logits[0, -1]
    assert not torch.allclose(dropped, dense, atol=1e-4), "the saved settings drop"


def test_vtprune_generate_answers_pruned(trained, capsys):
    run, data = trained
    path, record = image_of(data)
    question = record["conversations"][0]["value"].replace("<image>", "").strip()
    said = []
    for method in ([], ["--method", "none"]):
        assert main(["generate", "--model", str(run), "--image", str(path), "--prompt", question, *method]) == 0
        said.append(capsys.readouterr().out.strip())
    assert said[0]
    assert np.all([text.isprintable() for text in said])


def test_trl_trains_it_further(trained, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed (make ecosystem)")
    import datasets

    from vtprune_train.evaluation.answering import load

    run, data = trained
    loaded = load(str(run), device="cpu")
    loaded.processor.tokenizer.padding_side = "right"
    loaded.processor.tokenizer.chat_template = loaded.processor.chat_template
    records = json.loads((data / "train.json").read_text())[:32]
    rows = []
    for record in records:
        question, answer = (turn["value"] for turn in record["conversations"][:2])
        user = [{"type": "image"}, {"type": "text", "text": question.replace("<image>", "").strip()}]
        rows.append(
            {
                "images": [str(data / "images" / record["image"])],
                "prompt": [{"role": "user", "content": user}],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": answer}]}],
            }
        )
    dataset = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=8, max_steps=12, learning_rate=1e-3, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, bf16=False, max_length=None, seed=0,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=loaded.model, args=arguments, train_dataset=dataset, processing_class=loaded.processor
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert is_pruned(loaded.model)
    loaded.model.save_pretrained(tmp_path / "further")
    opened = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "further")
    assert method_of(prune(opened)) == method_of(loaded.model)
