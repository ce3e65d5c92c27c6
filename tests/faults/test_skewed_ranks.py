"""Two ranks with nothing in common under ZeRO-3, where every parameter is gathered by all ranks together."""

import json
from pathlib import Path

import pytest

from tests.support.runner import Runs

pytestmark = pytest.mark.slow

SETTINGS = (
    "deepspeed=configs/deepspeed/zero3.json",
    "data.eval=[]",
    "data.workers=0",
    "train.epochs=100",
    "train.max_steps=200",
    "train.global_batch_size=2",
    "train.activation_checkpointing=false",
    "train.spike_threshold=1",
    "model.config.text_config.num_hidden_layers=2",  # two hundred steps of as little as there can be
    "model.config.vision_config.num_hidden_layers=2",
    "pruning.layers=[1]",
    "pruning.keep=[0.5]",
)


def test_text_on_one_rank_and_images_on_the_other_end_together(tmp_path):
    runs = Runs(tmp_path)
    came = tmp_path / "came"
    env = {"FAULTS": json.dumps({"skewed": str(came)})}
    runs.run("skewed", *SETTINGS, script=Path(__file__).parent / "poison.py", env=env, ranks=2, timeout=240)
    assert [m["step"] for m in runs.metrics("skewed")] == list(range(1, 201))
    text, pictures = ((tmp_path / f"came.{rank}").read_text().split() for rank in (0, 1))
    assert len(text) == len(pictures) == 200
    assert set("".join(text)) == {"t", "-"} and set("".join(pictures)) == {"v", "-"}
    assert sum("t" in a and "v" in b for a, b in zip(text, pictures, strict=True)) > 30, "text beside pictures"
    assert sum("t" not in a and "v" in b for a, b in zip(text, pictures, strict=True)) > 20, "nothing beside pictures"
    metrics = runs.metrics("skewed")
    assert metrics[-1]["loss"] < metrics[0]["loss"] and not any(m["skipped"] for m in metrics)
    spikes = [json.loads(line) for line in (runs.directory("skewed") / "spikes.jsonl").read_text().splitlines()]
    for spike in spikes:
        assert spike["loss"] == metrics[spike["step"] - 1]["loss"] and spike["z"] > 1
        total = sum(sample["loss"] * sample["tokens"] for sample in spike["samples"])
        assert abs(total / metrics[spike["step"] - 1]["supervised_tokens"] - spike["loss"]) < 1e-4
    assert spikes
