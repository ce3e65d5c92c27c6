"""Fine-tune with the transformers Trainer while dropping visual tokens: only one additional line.

python examples/finetune_with_trainer.py                     # a tiny model with random weights on synthetic images
python examples/finetune_with_trainer.py --model llava-hf/llava-v1.6-vicuna-7b-hf --steps 100

Replace ``draw_samples`` with your own dataset of images and answers.
"""

from __future__ import annotations

import argparse
from typing import Any

from PIL import Image
from tiny import QUESTION, draw_samples, tiny_llava_next
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from vtprune_train import PyramidDrop, prune

IGNORED = -100


class Collator:
    """Turns (image, answer) pairs into a padded batch whose labels supervise the answers only.

    The prompt must stay unsupervised: the row before the answer ranks the visual tokens, as in generation.
    """

    def __init__(self, processor: Any):
        self.processor = processor
        self.processor.tokenizer.padding_side = "right"

    def __call__(self, samples: list[tuple[Image.Image, str]]) -> dict[str, Tensor]:
        images = [image for image, _ in samples]
        prompts = [f"USER: <image>\n{QUESTION} ASSISTANT:"] * len(samples)
        texts = [
            f"{prompt} {answer}{self.processor.tokenizer.eos_token}"
            for prompt, (_, answer) in zip(prompts, samples, strict=True)
        ]
        batch = self.processor(images=images, text=texts, return_tensors="pt", padding=True)
        prompt_lengths = self.processor(images=images, text=prompts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].clone()
        labels[batch["attention_mask"] == 0] = IGNORED
        for row, length in enumerate(prompt_lengths["attention_mask"].sum(dim=1).tolist()):
            labels[row, :length] = IGNORED
        return {**batch, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a LLaVA-NeXT folder or Hub id; default: a tiny model with random weights")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="runs/examples/trainer")
    arguments = parser.parse_args()

    if arguments.model is None:
        model, processor = tiny_llava_next()
    else:
        model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype="auto")
        processor = AutoProcessor.from_pretrained(arguments.model)
    prune(model, PyramidDrop(keep=(0.5, 0.25, 0.125)))  # the one line

    settings = TrainingArguments(
        output_dir=arguments.out,
        max_steps=arguments.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3 if arguments.model is None else 2e-5,
        remove_unused_columns=False,
        logging_steps=max(1, arguments.steps // 5),
        save_strategy="no",
        report_to=[],
    )
    trainer = Trainer(model=model, args=settings, train_dataset=draw_samples(64), data_collator=Collator(processor))
    result = trainer.train()
    trainer.save_model()  # the pruning settings go into config.json
    processor.save_pretrained(arguments.out)
    print(f"final loss {result.training_loss:.3f}; saved in {arguments.out}")


if __name__ == "__main__":
    main()
