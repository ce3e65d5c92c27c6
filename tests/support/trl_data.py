"""What TRL's trainer is given."""

import io

import datasets
import numpy as np
import torch
from PIL import Image

from tests.support.helpers import tiny_processor

CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}assistant : {% generation %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{{ m['content'][0]['text'] }}{% endif %} </s>"
    "{% endgeneration %}{% else %}user : {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% endif %}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)

ANSWERS = ["yes .", "no .", "a red cat on the left .", "two dog ."]


def draw_image(seed):
    rng = np.random.default_rng(seed)
    height, width = [(28, 56), (56, 28), (56, 56), (30, 80)][seed % 4]
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def chat_processor():
    processor = tiny_processor()
    processor.tokenizer.padding_side = "right"
    processor.chat_template = processor.tokenizer.chat_template = CHAT
    return processor


def collate(rows):
    """Padded rows, as people write them for the Trainer: the prompt is not supervised."""
    processor = chat_processor()
    texts = [f"user : <image> what is shown ? assistant : {row['answer']} </s>" for row in rows]
    made = processor(images=[draw_image(row["seed"]) for row in rows], text=texts, return_tensors="pt", padding=True)
    labels = made["input_ids"].clone()
    for row, own in enumerate(labels):
        last_colon = int(torch.nonzero(own == processor.tokenizer.convert_tokens_to_ids(":"))[-1])
        own[: last_colon + 1] = -100
        own[made["attention_mask"][row] == 0] = -100
    return {**made, "labels": labels}


def rows(count=16):
    return [{"seed": seed, "answer": ANSWERS[seed % 4]} for seed in range(count)]


def dataset_of(examples):
    images = [
        [{"bytes": None, "path": None, **encoded(image)} for image in example.pop("images")] for example in examples
    ]
    made = datasets.Dataset.from_list(
        [{**example, "images": own} for example, own in zip(examples, images, strict=True)]
    )
    return made.cast_column("images", datasets.List(datasets.Image()))


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue()}
