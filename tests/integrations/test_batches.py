"""Packing and batches by tokens under transformers' Trainer: the padded Trainer's losses, resume, two ranks."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from tests.support.families import FAMILIES, family_model
from tests.support.trainer_runs import HALF, SAMPLES, Collate, CollateVideos, sample, trainer
from vtprune_train import batch_by_tokens, pack, prune
from vtprune_train.data.trainer_batches import Lengths, StepLoader, StepSampler, measure_lengths

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ROWS = [sample(number) for number in range(SAMPLES)]
SAMPLING = str(TrainingArguments.__dataclass_fields__["train_sampling_strategy"].metadata)


def trained(*args, **kwargs):
    made = trainer(*args, **kwargs)
    made.train()
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_equal_the_padded_trainer(tmp_path, family):
    """20 steps, three epochs with an incomplete step at the end of each."""
    # Training amplifies rounding, most of all with the delta rule and experts that are chosen by their scores.
    settings = {"learning_rate": 1e-6 if family == "qwen3_5_moe" else 2e-5}
    padded = trained("padded", tmp_path / "padded", family, **settings)
    packed = trained("pack", tmp_path / "pack", family, **settings)
    assert len(padded.losses) == 20
    assert np.allclose(packed.losses, padded.losses, rtol=1e-4), family


@pytest.mark.parametrize("variant", ["pack", "prune"])
@pytest.mark.parametrize("family", ["llava_next", "internvl", "qwen2_5_vl"])
def test_batches_by_tokens_change_no_loss(tmp_path, family, variant):
    """Qwen2.5-VL takes no number of items: the Trainer's loss is the step's mean only with one micro-batch a step."""
    whole = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    plain = trained(variant, tmp_path / "plain", family, **whole)
    by_tokens = trained(f"{variant}_tokens", tmp_path / "tokens", family, max_tokens=200)
    assert len(by_tokens.losses) == 20
    assert np.allclose(by_tokens.losses, plain.losses, atol=2e-4)
    assert max(sum(lengths) for lengths in by_tokens.passes) <= 200
    # The same samples in every step, fewer passes than samples.
    seen = [sorted(itertools.chain.from_iterable(made.passes)) for made in (plain, by_tokens)]
    assert seen[0] == seen[1]
    assert len(by_tokens.passes) < len(seen[0])


@pytest.mark.parametrize("variant", ["pack", "prune"])
@pytest.mark.parametrize("family", ["llava_next_video", "qwen2_5_vl"])
def test_videos(tmp_path, family, variant):
    videos = {"collate": CollateVideos(family), "rows": list(range(SAMPLES)), "steps": 10}
    whole = {**videos, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    plain, by_tokens = (trained(name, tmp_path / name, family, **whole) for name in (variant, f"{variant}_tokens"))
    assert np.allclose(by_tokens.losses, plain.losses, atol=2e-4)
    assert len(by_tokens.losses) == 10 and len(set(map(len, by_tokens.passes))) > 1
    if variant == "pack":
        padded = trained("padded", tmp_path / "padded", family, **whole)
        assert np.allclose(plain.losses, padded.losses, rtol=1e-4)


def test_resume_in_the_middle_of_an_epoch(tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 10, "optim": "adamw_torch"}
    whole = trained("prune_tokens", tmp_path / "whole", **saves)
    resumed = trainer("prune_tokens", tmp_path / "again", **saves)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-10"))
    assert resumed.losses == whole.losses[10:]
    assert resumed.passes == whole.passes[-len(resumed.passes) :]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def on_two_ranks(folder, *arguments):
    folder.mkdir()
    command = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", "2"]
    script = [ROOT / "tests" / "support" / "trainer_runs.py", folder, *arguments]
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*command, *script], capture_output=True, text=True, env={**os.environ, **settings}, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks(tmp_path):
    """The losses of one rank; each rank runs as many passes; resumed from step 3, in the middle of an epoch."""
    one = trained("pack", tmp_path / "one", steps=9)
    ranks = on_two_ranks(tmp_path / "two", "pack_tokens", "9")
    # The last step of an epoch (the seventh) has two samples here and is filled up by the plain Trainer.
    assert np.allclose(ranks[0]["losses"], one.losses, atol=1e-3)
    assert len(ranks[0]["passes"]) == len(ranks[1]["passes"])
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert len(Lengths.load(tmp_path / "lengths.npz")) == SAMPLES
    again = on_two_ranks(tmp_path / "again", "pack_tokens", "9", tmp_path / "two" / "checkpoint-3")
    assert again[0]["losses"] == pytest.approx(ranks[0]["losses"][3:], abs=1e-6)
    assert again[0]["weights"] == pytest.approx(ranks[0]["weights"], abs=1e-6)


def test_two_ranks_with_zero_2(tmp_path):
    """DeepSpeed reduces after the last micro-batch of a step."""
    padded, by_tokens = (
        on_two_ranks(tmp_path / variant, f"zero2_{variant}", "6")[0] for variant in ("padded", "pack_tokens")
    )
    assert by_tokens["losses"] == pytest.approx(padded["losses"], rel=1e-5)
    assert by_tokens["passes"] != padded["passes"]


@pytest.fixture(scope="module")
def packed():
    return pack(family_model("llava_next"))


def test_lengths(packed, tmp_path):
    lengths = measure_lengths(packed, ROWS, Collate("llava_next"))
    batch = Collate("llava_next")(ROWS)
    assert lengths.tokens.tolist() == batch["attention_mask"].sum(1).tolist()
    assert lengths.supervised.tolist() == (batch["labels"] != -100).sum(1).tolist()
    visual = (batch["input_ids"] == packed.config.image_token_id).sum(1)
    assert np.bincount(lengths.span_sample, lengths.spans, len(ROWS)).tolist() == visual.tolist()
    lengths.save(tmp_path / "lengths.npz")
    again = Lengths.load(tmp_path / "lengths.npz")
    assert again.tokens.tolist() == lengths.tokens.tolist()
    assert (prune(family_model("llava_next"), HALF) is not None) and lengths.costs(packed).min() > 0
    dropping = lengths.costs(prune(family_model("llava_next"), HALF))
    with_images = visual.numpy() > 0
    assert (dropping[with_images] < lengths.costs(packed)[with_images]).all()
    assert np.allclose(dropping[~with_images], lengths.costs(packed)[~with_images])


def test_lengths_in_a_file_are_measured_once(tmp_path, monkeypatch):
    file = tmp_path / "cache" / "lengths.npz"
    first = trained("pack_tokens", tmp_path / "a", steps=2, lengths=file)
    monkeypatch.setattr("vtprune_train.data.trainer_batches.measure_lengths", None)
    second = trained("pack_tokens", tmp_path / "b", steps=2, lengths=file)
    assert second.losses == first.losses


def test_a_custom_loop_resumes(packed):
    collate = Collate("llava_next")
    loader = StepLoader(packed, ROWS, collate, batch_size=4, max_tokens=400, seed=3)
    lengths = loader.lengths

    def items(loader):
        return [[batch["input_ids"].tolist() for batch in step["micro_batches"]] for step in loader]

    loader.set_epoch(1)
    whole = items(loader)
    assert len(whole) == len(loader) == 7
    loader.set_epoch(1)
    assert items(skip_first_batches(loader, 3)) == whole[3:]
    loader.set_epoch(2)
    assert items(loader) != whole
    workers = StepLoader(packed, ROWS, collate, batch_size=4, max_tokens=400, seed=3, lengths=lengths, num_workers=2)
    workers.set_epoch(1)
    assert items(workers) == whole
    step = next(iter(loader))
    total = sum(
        float(packed(**batch, num_items_in_batch=step["num_items_in_batch"]).loss) for batch in step["micro_batches"]
    )
    counts = [(batch["labels"] != -100).sum() for batch in step["micro_batches"]]
    means = [float(packed(**batch).loss) for batch in step["micro_batches"]]
    assert total == pytest.approx(float(np.average(means, weights=counts)), rel=1e-5)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_take_all_samples_once(packed, world_size):
    lengths = measure_lengths(packed, ROWS, Collate("llava_next"))
    samplers = [
        StepSampler(
            SequentialSampler(ROWS), lengths, lengths.costs(packed), batch_size=12, max_tokens=400, rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    for number, steps in enumerate(zip(*samplers, strict=True)):
        assert len({len(step[0].micro_batches) for step in steps}) == 1
        seen = sorted(sample for step in steps for micro_batch in step[0].micro_batches for sample in micro_batch)
        assert seen == list(range(number * 12, min(SAMPLES, number * 12 + 12)))


def test_more_ranks_than_samples(packed):
    """A rank without samples runs a pass whose loss is 0."""
    rows = ROWS[:2]
    loader = StepLoader(packed, rows, Collate("llava_next"), batch_size=8, max_tokens=400, rank=2, world_size=3)
    (step,) = loader
    assert step["supervised"] == [0] and step["num_items_in_batch"] > 0
    loss = packed(**step["micro_batches"][0], num_items_in_batch=step["num_items_in_batch"]).loss
    assert float(loss) == 0.0


def test_wrong_use(packed, tmp_path):
    collate = Collate("llava_next")
    with pytest.raises(ValueError, match=r"call pack\(model\)"):
        StepLoader(family_model("llava_next"), ROWS, collate, batch_size=4, max_tokens=400)
    with pytest.raises(ValueError, match=r"max_tokens=100 is less than the \d+ tokens of sample \d+"):
        StepLoader(packed, ROWS, collate, batch_size=4, max_tokens=100)
    with pytest.raises(ValueError, match="batch_size=0 must be a positive whole number"):
        StepLoader(packed, ROWS, collate, batch_size=0, max_tokens=100)
    lengths = measure_lengths(packed, ROWS[:3], collate)
    with pytest.raises(ValueError, match="lengths are of 3 samples, but the dataset has 26"):
        StepLoader(packed, ROWS, collate, batch_size=4, max_tokens=400, lengths=lengths)
    with pytest.raises(ValueError, match="without 'labels'"):
        measure_lengths(packed, ROWS, lambda rows: {"input_ids": torch.zeros(1, 3, dtype=torch.long)})
    with pytest.raises(ValueError, match="LlavaNextForConditionalGeneration is not a transformers Trainer"):
        batch_by_tokens(packed, 400)
    with pytest.raises(ValueError, match="'llava' is not a model; load it with from_pretrained"):
        pack("llava")
    with pytest.raises(ValueError, match="has no length"):
        StepLoader(packed, iter(ROWS), collate, batch_size=4, max_tokens=400)
    with pytest.raises(ValueError, match=r"call pack\(model\)"):
        batch_by_tokens(trainer("padded", tmp_path), 400)
    made = trainer("pack_tokens", tmp_path)
    with pytest.raises(ValueError, match="already"):
        batch_by_tokens(made, 400)
    assert isinstance(made, Trainer)
    with pytest.raises(ValueError, match="max_tokens=0 must be a positive whole number"):
        batch_by_tokens(trainer("pack", tmp_path), 0)
    with pytest.raises(ValueError, match="auto_find_batch_size=True would change the number of samples"):
        batch_by_tokens(trainer("pack", tmp_path, auto_find_batch_size=True), 400)
    (tmp_path / "lengths.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match=r"lengths\.npz does not hold lengths .* delete it"):
        trainer("pack_tokens", tmp_path, lengths=tmp_path / "lengths.npz").train()
    with pytest.raises(ValueError, match="without 'input_ids' \\(list\\)"):  # as TRL's GRPO collates
        measure_lengths(packed, ROWS, lambda rows: rows)


@pytest.mark.skipif("batch_rebalance" not in SAMPLING, reason="this transformers has no batch_rebalance")
def test_a_sampler_that_forms_batches_itself_is_refused(tmp_path):
    made = trainer("pack_tokens", tmp_path, train_sampling_strategy="batch_rebalance")
    made.train_dataset = [{"input_ids": list(range(3))}] * 26
    with pytest.raises(ValueError, match="BatchRebalanceSampler forms batches itself"):
        made.get_train_dataloader()
