"""Spikes and the look at memory: what is decided, without a training process."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vtprune_train.config.load import load_config, without_effect
from vtprune_train.training.faults.preflight import (
    advice,
    heaviest,
    is_out_of_memory,
    needs_preflight,
    unchanged_random_states,
)
from vtprune_train.training.loop.callbacks.spikes import Spikes, sample_losses, z_score

CPU = torch.device("cpu")


def test_z_score():
    recent = [2.0, 2.1, 1.9, 2.05, 1.95] * 4
    assert z_score(2.0, recent) == 0
    assert z_score(2.0 + 1.4826 * 0.05, recent) == pytest.approx(1)
    assert z_score(9.0, [*recent, 50.0, 60.0]) > 50, "spikes of the past do not hide this one"
    assert z_score(1.0, recent) < 0
    assert z_score(2.001, [2.0] * 20) == pytest.approx(0.5), "equal losses have no spread"


def step_of(losses_of_samples):
    """A trainer whose last step had one micro-batch of these samples: lists of token losses."""
    batch = SimpleNamespace(
        sample_ids=tuple(f"s{i}" for i in range(len(losses_of_samples))),
        targets_per_sample=tuple(len(losses) for losses in losses_of_samples),
    )
    rows = torch.tensor([loss for losses in losses_of_samples for loss in losses])
    return SimpleNamespace(
        batches=[batch], row_losses=[rows], state=SimpleNamespace(step=0), checkpoints=SimpleNamespace(resumed=None)
    )


def test_sample_losses_are_the_samples_own():
    trainer = step_of([[1.0, 3.0], [], [7.0], [0.5, 0.5, 2.0]])
    assert sample_losses(trainer) == [
        {"id": "s2", "loss": 7.0, "tokens": 1},
        {"id": "s0", "loss": 2.0, "tokens": 2},
        {"id": "s3", "loss": 1.0, "tokens": 3},
    ]


def run_spikes(folder, losses, resume_at=None):
    """Feed losses to the callback, as the loop does; optionally stop and start again after some."""
    trainer = step_of([[1.0], [9.0]])
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.01, len(losses))
    spikes = None
    for step, loss in enumerate(losses, start=1):
        if spikes is None or step == resume_at:
            trainer.state.step = step - 1
            spikes = Spikes(folder, threshold=8, window=30)
            spikes.on_start(trainer)
        record = {"step": step, "loss": None if loss is None else loss + noise[step - 1]}
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        spikes.on_step(trainer, record)
    return (folder / "spikes.jsonl").read_text(), spikes.recent


@pytest.mark.parametrize("resume_at", [10, 33, 36])
def test_spikes_are_found_and_a_resumed_run_judges_alike(tmp_path, resume_at, caplog):
    losses = [3 - 0.01 * i for i in range(40)]
    losses[4] = 9.0  # too early to judge
    losses[29], losses[34] = None, 6.0
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    found, recent = run_spikes(tmp_path / "one", losses)
    line = json.loads(found)
    assert line["step"] == 35 and line["z"] > 8 and [s["id"] for s in line["samples"]] == ["s1", "s0"]
    assert "step 35" in caplog.text and "s1 (9)" in caplog.text
    again, recent_again = run_spikes(tmp_path / "two", losses, resume_at)
    assert found == again and list(recent) == list(recent_again) and len(recent) == 30


def test_lines_that_have_lost_their_loss_do_not_block_a_resume(tmp_path):
    """An older version's checkpoint has no copy to restore them from."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2}\n{"step": 3, "loss": "no"}\n')
    trainer = step_of([[1.0]])
    trainer.state.step = 3
    spikes = Spikes(tmp_path, threshold=8, window=30)
    spikes.on_start(trainer)
    assert list(spikes.recent) == [2.5]


def test_heaviest_fills_the_limit():
    tokens = np.array([10, 60, 50, 45, 100])
    weight = np.array([9, 50, 49, 44, 70])
    assert heaviest(tokens, weight, 100, 8) == [2, 3]
    assert heaviest(tokens, weight, 99, 1) == [1]
    assert heaviest(np.array([7]), np.array([0]), 10, 4) == [0]


def test_running_out_of_memory_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("x")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_random_states_are_put_back():
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    with unchanged_random_states(CPU):
        torch.rand(3), np.random.rand(3)
    assert torch.equal(before[0], torch.random.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()


def test_when_to_look_and_what_to_advise():
    config = load_config("quickstart.yaml")
    assert not needs_preflight(config, CPU) and needs_preflight(config, torch.device("cuda", 0))
    assert needs_preflight(load_config("quickstart.yaml", ["train.preflight=always"]), CPU)
    assert not needs_preflight(load_config("quickstart.yaml", ["train.preflight=never"]), torch.device("cuda", 0))
    said = advice(config, [], CPU, MemoryError("no"), None)
    for words in ("data.max_tokens=4096", "activation_checkpointing=all", "zero3.json", "zero3_offload.json", "LoRA"):
        assert words in said
    turned = load_config(
        "quickstart.yaml", ["train.activation_checkpointing=all", "deepspeed=configs/deepspeed/zero3_offload.json"]
    )
    said = advice(turned, [], CPU, MemoryError("no"), None)
    assert "activation_checkpointing" not in said and "ZeRO stage" not in said and "offload" not in said


def test_settings_without_effect():
    given = ["train.spike_threshold=null", "train.spike_window=50", "train.max_skipped=3"]
    lines = without_effect(load_config("quickstart.yaml", given))
    assert any("train.spike_window" in line for line in lines) and any("train.max_skipped" in line for line in lines)
    assert not [x for x in without_effect(load_config("quickstart.yaml", ["train.on_non_finite=skip"])) if "skip" in x]
