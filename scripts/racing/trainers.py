"""Rows of the race with transformers' Trainer or TRL's SFTTrainer: ``python -m racing.trainers NAME FOLDER RESULT``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import (
    AutoProcessor,
    LlavaNextForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from racing.recorder import Recorder
from racing.samples import read_samples
from racing.setup import Setup
from vtprune_train import PyramidDrop, pack, prune
from vtprune_train.data.order import EpochOrder
from vtprune_train.training.loop.metrics import device_peak_flops


class Measure(TrainerCallback):
    """Records every step."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.recorder.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.recorder.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.recorder.losses.append(logs["loss"])


class Collator:
    """Reads the images of a batch and pads its samples, as TRL does. ``tokens`` are those of each batch, without
    padding."""

    def __init__(self, processor: Any):
        self.processor = processor
        self.tokens: list[int] = []

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        made = self.processor.apply_chat_template(
            [messages_of(row) for row in rows],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "right", "add_special_tokens": False},
        )
        labels = made["input_ids"].masked_fill(made.pop("assistant_masks") == 0, -100)
        self.tokens.append(int(made["attention_mask"].sum()))
        return {**made, "labels": labels}


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation of a sample, with its images in place."""
    images = iter(row["images"])
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": next(images)} if part["type"] == "image" else part
                for part in ({key: value for key, value in part.items() if value} for part in message["content"])
            ],
        }
        for message in row["messages"]
    ]


def ordered_samples(setup: Setup) -> list[dict[str, Any]]:
    """The samples with their ``length``, in the order in which the project's loop takes them."""
    rows = [{**row, "length": length} for row, length in zip(read_samples(setup.data), setup.lengths, strict=True)]
    order = EpochOrder([len(rows)], seed=setup.seed).samples(0, 0, len(rows))
    return [rows[i] for i in order.tolist()]


def dataset_of(setup: Setup) -> datasets.Dataset:
    columns = datasets.Dataset.from_list(ordered_samples(setup))
    return columns.cast_column("images", datasets.List(datasets.Image()))


def shared_settings(setup: Setup) -> dict[str, Any]:
    """Arguments of every trainer, and of the frameworks built on transformers' Trainer."""
    return {
        "max_steps": setup.steps,
        "per_device_train_batch_size": setup.micro_batch,
        "gradient_accumulation_steps": setup.global_batch // setup.micro_batch,
        "learning_rate": setup.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": setup.clip,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "use_cpu": setup.device == "cpu",
    }


def settings_of(name: str, setup: Setup) -> dict[str, Any]:
    """Arguments of the trainer, without paths."""
    settings = {
        **shared_settings(setup),
        "train_sampling_strategy": "group_by_length" if name == "trainer_length_grouped" else "sequential",
        "bf16": False,  # the weights have the data type already
    }
    if name == "trl_sft":
        settings |= {"assistant_only_loss": True, "max_length": None}
    return settings


def run(name: str, setup: Setup, out: Path) -> None:
    """Train, and write the measurements to ``out``."""
    set_seed(setup.seed)
    processor = AutoProcessor.from_pretrained(setup.checkpoint)
    model = LlavaNextForConditionalGeneration.from_pretrained(
        setup.checkpoint, dtype=getattr(torch, setup.dtype), attn_implementation="sdpa"
    )
    device = torch.device(setup.device)
    model.to(device)
    if name == "trainer_pack":
        pack(model)
    if name == "trainer_prune":
        prune(model, PyramidDrop())
    settings = settings_of(name, setup)
    recorder, collate = Recorder(device), Collator(processor)
    logs: dict[str, Any] = {
        "output_dir": str(out.with_suffix("")),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "remove_unused_columns": False,
        "seed": setup.seed,
        "disable_tqdm": True,
    }
    shared = {"model": model, "train_dataset": dataset_of(setup), "callbacks": [Measure(recorder)]}
    if name == "trl_sft":
        import trl

        trainer = trl.SFTTrainer(args=trl.SFTConfig(**settings, **logs), processing_class=processor, **shared)
        count_tokens(trainer, collate)
    else:
        trainer = Trainer(args=TrainingArguments(**settings, **logs), data_collator=collate, **shared)
    trainer.train()
    per_step = setup.global_batch // setup.micro_batch
    recorder.tokens = [sum(collate.tokens[step * per_step : (step + 1) * per_step]) for step in range(setup.steps)]
    shown = {**settings, "attn_implementation": "sdpa", "dtype": setup.dtype}
    recorder.write(out, shown, device_peak_flops(device))


def count_tokens(trainer: Any, collate: Collator) -> None:
    """Count the tokens of TRL's batches as well."""
    make = trainer.data_collator

    def counted(rows: Any) -> Any:
        made = make(rows)
        collate.tokens.append(int(made["attention_mask"].sum()))
        return made

    trainer.data_collator = counted


if __name__ == "__main__":
    run(sys.argv[1], Setup.read(sys.argv[2]), Path(sys.argv[3]))
