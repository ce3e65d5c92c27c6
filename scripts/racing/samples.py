"""What every row of the race trains on: one checkpoint, and images and conversations on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor, PreTrainedTokenizerFast

import bench

SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<unk>", "user", "assistant", ":"]
# Kinds of samples, repeated: 14 of 16 have one image, one has two, and one has only text.
PATTERN = (1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1)
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}assistant : {% generation %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{{ m['content'][0]['text'] }}{% endif %} </s>"
    "{% endgeneration %}{% else %}user : {% if m['content'] is string %}{{ m['content'] }} {% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% endif %}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


def make_processor(geometry: bench.Geometry, pinpoints: list[list[int]], vocab: int) -> LlavaNextProcessor:
    """The processor of the geometry, whose tokenizer has one token for each word."""
    words = {word: index for index, word in enumerate([*SPECIAL, *(f"w{n}" for n in range(vocab - len(SPECIAL)))])}
    assert words["<image>"] == bench.IMAGE_TOKEN
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="right",
    )
    side = geometry.vision["image_size"]
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=pinpoints
    )
    processor = LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=geometry.vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.chat_template = processor.tokenizer.chat_template = TEMPLATE
    return processor


def write_checkpoint(geometry: bench.Geometry, folder: Path) -> None:
    """Save a model with random weights, and its processor."""
    model, anyres = bench.build(geometry, torch.device("cpu"))
    model.config.image_seq_length = anyres.patches_per_tile
    ids = {"pad_token_id": SPECIAL.index("<pad>"), "bos_token_id": SPECIAL.index("<s>")}
    ids["eos_token_id"] = SPECIAL.index("</s>")
    model.config.text_config.update(ids)
    model.generation_config.update(**ids)
    model.save_pretrained(folder)
    pinpoints = model.config.image_grid_pinpoints
    make_processor(geometry, pinpoints, model.config.text_config.vocab_size).save_pretrained(folder)


def write_samples(geometry: bench.Geometry, count: int, folder: Path) -> None:
    """Write ``train.json`` in the LLaVA form, and ``images/*.png`` of the geometry's sizes."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    vocab = geometry.text["vocab_size"] - len(SPECIAL)
    scale = np.mean([text for _, text in geometry.samples])
    smallest = min(geometry.samples, key=lambda sample: sample[0][0] * sample[0][1])[0]
    records, singles = [], 0
    for number in range(count):
        num_images = PATTERN[number % len(PATTERN)]
        sizes = [smallest] * num_images
        if num_images == 1:
            sizes, singles = [geometry.samples[singles % len(geometry.samples)][0]], singles + 1
        names = []
        for position, (height, width) in enumerate(sizes):
            names.append(f"{number:05d}-{position}.png")
            pixels = np.kron(rng.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3)), np.ones((8, 8, 1)))
            Image.fromarray(pixels[:height, :width].astype(np.uint8)).save(folder / "images" / names[-1])
        # The median text has `scale` tokens, a third of them in the question; text-only samples have longer texts.
        length = scale * np.exp(rng.normal(0, 0.6)) * (1 if num_images else 3)
        question, answer = (words(rng, max(4, round(share * length)), vocab) for share in (1 / 3, 2 / 3))
        record: dict[str, Any] = {
            "id": str(number),
            "conversations": [
                {"from": "human", "value": "<image> " * num_images + question},
                {"from": "gpt", "value": answer},
            ],
        }
        records.append(record | ({"image": names if num_images > 1 else names[0]} if names else {}))
    (folder / "train.json").write_text(json.dumps(records))


def words(rng: np.random.Generator, count: int, vocab: int) -> str:
    return " ".join(f"w{n}" for n in rng.integers(0, vocab, count))


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The samples as ``messages`` and paths of ``images``, in the order of ``train.json``."""
    rows = []
    for record in json.loads((folder / "train.json").read_text()):
        named = record.get("image", [])
        names = [named] if isinstance(named, str) else named
        prompt, answer = (turn["value"] for turn in record["conversations"])
        parts = [*({"type": "image"} for _ in names), {"type": "text", "text": prompt.replace("<image> ", "")}]
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": parts},
                    {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                ],
                "images": [str(folder / "images" / name) for name in names],
            }
        )
    return rows
