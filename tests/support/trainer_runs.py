"""transformers' Trainer on tiny models of every family; as a script, one run on several ranks::

torchrun --nproc_per_node 2 tests/support/trainer_runs.py OUT VARIANT STEPS [CHECKPOINT]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments, set_seed

from tests.support.families import family_inputs, family_model
from tests.support.video_inputs import video_inputs
from vtprune_train import PyramidDrop, pack, prune
from vtprune_train.data.trainer_batches import batch_by_tokens

SAMPLES = 26  # 4 samples a step: the last step of an epoch has 2
QUESTION, ANSWER = ["user", ":", "what", "is", "shown", "?"], ["assistant", ":"]
ANSWERS = [["yes", "."], ["no", "."], ["a", "red", "cat", "on", "the", "left", "."], ["two", "dog", "."]]
HALF = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25))


def sample(number: int, text_only: bool = True) -> list[str | int]:
    """Words, with a number where an image stands: one image, two images, or (with ``text_only``) none."""
    images: list[str | int] = [[number], [number, number + 1], [] if text_only else [number]][number % 3]
    return [*QUESTION, *images, *["here"] * (number % 5), *ANSWER, *ANSWERS[number % 4]]


class Collate:
    """Padded batches, whose labels supervise the answers."""

    def __init__(self, family: str):
        self.family = family

    def __call__(self, samples: list[list[str | int]]) -> dict[str, Tensor]:
        batch = family_inputs(self.family, samples, side="right")
        labels = batch["input_ids"].clone()
        labels[batch["attention_mask"] == 0] = -100
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            words = samples[row]
            labels[row, : length - (len(words) - 1 - words.index("assistant") - 1)] = -100
        return {**batch, "labels": labels}


class CollateVideos:
    """Padded batches of conversations with one video or none, whose last words are supervised."""

    def __init__(self, family: str):
        self.family = family

    def __call__(self, numbers: list[int]) -> dict[str, Tensor]:
        texts = [self._text(number) for number in numbers]
        batch = video_inputs(self.family, texts, side="right")
        alone = [video_inputs(self.family, [text], seed=number) for number, text in zip(numbers, texts, strict=True)]
        if "pixel_values_videos" in batch:
            videos = [inputs["pixel_values_videos"] for inputs in alone if "pixel_values_videos" in inputs]
            batch["pixel_values_videos"] = torch.cat(videos)
        if "second_per_grid_ts" in batch:
            batch["second_per_grid_ts"] = [1.0] * len(batch["second_per_grid_ts"])
        labels = batch["input_ids"].clone()
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            labels[row, : length - 3] = -100
            labels[row, length:] = -100
        return {**batch, "labels": labels}

    def _text(self, number: int) -> list[str | tuple[int, int, int]]:
        grid = (4, 4, 4) if self.family.startswith("llava") else (2 + number % 3, 4, 4 + 2 * (number % 2))
        video = [grid] if number % 4 else []
        return [
            "user : what is shown ?",
            *video,
            "here " * (number % 5) + "assistant : " + " ".join(ANSWERS[number % 4]),
        ]


class Losses(Trainer):
    """transformers' Trainer, unchanged but for keeping what it logs, and the samples of each pass."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []
        self.passes: list[list[int]] = []

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self.losses += [logs["loss"]] if "loss" in logs else []
        super().log(logs, *args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.passes.append(inputs["attention_mask"].sum(dim=1).tolist())
        return super().compute_loss(model, inputs, *args, **kwargs)


def trainer(variant: str, folder: Path, family: str = "llava_next", steps: int = 20, **settings: Any) -> Losses:
    """``variant``: ``padded``, ``pack``, ``pack_tokens`` (with :func:`batch_by_tokens`), ``prune`` or
    ``prune_tokens``."""
    max_tokens = settings.pop("max_tokens", 400)
    lengths = settings.pop("lengths", None)
    text_only = settings.pop("text_only", True)
    collate = settings.pop("collate", None) or Collate(family)
    rows = settings.pop("rows", None) or [sample(number, text_only) for number in range(SAMPLES)]
    set_seed(0)
    model = family_model(family)
    if variant != "padded":
        (pack(model) if variant.startswith("pack") else prune(model, HALF))
    ranks = settings.pop("ranks", 1)
    arguments = TrainingArguments(**{
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 2 // ranks,
        "gradient_accumulation_steps": 2, "learning_rate": 2e-4, "optim": "sgd", "max_grad_norm": 0.0,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "seed": 0,
        "remove_unused_columns": False, "disable_tqdm": True, **settings,
    })  # fmt: skip
    made = Losses(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    if variant.endswith("_tokens"):
        batch_by_tokens(made, max_tokens, lengths=lengths)
    return made


def main() -> None:
    folder, variant, steps, *resume = sys.argv[1:]
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_tokens": 200}
    if variant.startswith("zero2_"):
        variant = variant.removeprefix("zero2_")
        settings["text_only"] = False  # ZeRO fails where one rank has no image, in the plain Trainer too
        settings["deepspeed"] = {
            "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True, "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        }  # fmt: skip
    lengths = Path(folder).parent / "lengths.npz"  # written by the first run of a test, and read by the next
    made = trainer(variant, Path(folder), steps=int(steps), ranks=2, lengths=lengths, **settings)
    made.train(resume_from_checkpoint=resume[0] if resume else None)
    weights = {name: float(tensor.double().sum()) for name, tensor in made.model.state_dict().items()}
    out = {"losses": made.losses, "passes": made.passes, "weights": weights}
    Path(folder, f"rank{made.args.process_index}.json").write_text(json.dumps(out))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo and DeepSpeed sometimes abort the process while it ends


if __name__ == "__main__":
    main()
