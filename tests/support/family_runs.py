"""Every family in the training loop, on one small data set."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image
from transformers import GotOcr2ImageProcessorPil, Qwen2VLImageProcessorPil, Qwen3_5Tokenizer

from tests.support.families import QWEN_SIZE, SPECIAL, family_model, family_processor, tokenizer
from tests.support.helpers import PATCH, TILE
from tests.support.runner import Runs
from vtprune_train.config.settings import Config
from vtprune_train.models.families import FAMILIES
from vtprune_train.models.families.base import Loop
from vtprune_train.models.io.build import set_trainable
from vtprune_train.training.loop.data import build_collator
from vtprune_train.training.loop.parts import build_parts, training_cost

# LLaVA-NeXT is what all other tests of the loop train.
NAMES = [f.model_type for f in FAMILIES if isinstance(f.loop, Loop) and f.model_type != "llava_next"]
TEMPLATE = {"user": "user : {text}", "assistant": " assistant :", "answer": " {text}{eos}", "separator": " "}
SIZES = [(40, 70), (90, 30), (50, 50), (84, 84), (30, 31), (64, 100)]
RECORDS = [
    (["<image> what is shown here ?", "a red cat", "left ?", "no"], [0]),
    (["what is a dog ?", "round"], []),
    (["<image> two <image> ?", "yes", "a <image> dog ?", "blue round dog"], [1, 2, 3]),
    (["is <image> red ?", "no"], [4]),
    (["<image> or <image>", "the left"], [5, 0]),
]

TEXT_ONLY = 1


def image_processor(name):
    if name.startswith("qwen"):
        return Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, size=QWEN_SIZE)
    if name == "internvl":
        return GotOcr2ImageProcessorPil(size={"height": TILE, "width": TILE}, crop_to_patches=True, max_patches=4)
    return family_processor(name).image_processor


def family_tokenizer(name):
    """``AutoTokenizer`` opens every tokenizer of Qwen3.5 as its own class, which splits text into bytes."""
    if name != "qwen3_5":
        return tokenizer()
    characters = [chr(code) for code in range(33, 127)] + ["\u0120", "\u010a"]
    vocab = {word: index for index, word in enumerate([*SPECIAL, *characters])}
    names = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    return Qwen3_5Tokenizer(vocab=vocab, merges=[], **names, additional_special_tokens=SPECIAL[4:])


def save_checkpoint(name, folder):
    """As a hub would hold it."""
    family_model(name).save_pretrained(folder)
    image_processor(name).save_pretrained(folder)
    words = family_tokenizer(name)
    if name == "internvl":
        names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
        words.init_kwargs.update(names, video_token="<v>")
    words.save_pretrained(folder)
    return folder


def write_records(folder):
    (folder / "images").mkdir(parents=True)
    for number, size in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    records = [
        {
            "id": str(index),
            "image": [f"{number}.png" for number in images],
            "conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)],
        }
        for index, (texts, images) in enumerate(RECORDS)
    ]
    (folder / "train.json").write_text(json.dumps(records))


class Setup:
    """A checkpoint of the family and the records, through the loop's own building."""

    def __init__(self, name, folder):
        self.name, self.folder = name, folder
        save_checkpoint(name, folder / "model")
        write_records(folder)
        self.config = Config(
            run={"name": "run", "output_dir": str(folder)},
            model={"path": str(folder / "model"), "dtype": "float32"},
            data={
                "root": str(folder),
                "train": [{"path": "train.json", "images": "images"}],
                "template": TEMPLATE,
                "cache_dir": str(folder / "cache"),
                "workers": 0,
            },
        )
        (folder / "run").mkdir()

    def parts(self):
        parts = build_parts(self.config)
        set_trainable(parts.model, self.config.model.train)
        return parts

    def collator(self, parts, method):
        return build_collator(self.config, parts, training_cost(self.config, parts.model.config), method, "train")


def written(texts, name):
    """The conversation as the template writes it."""
    rounds = zip(texts[::2], texts[1::2], strict=True)
    if name == "qwen3_5":  # spaces are tokens
        return " ".join(f"user : {question} assistant : {answer}</s>" for question, answer in rounds)
    return "<s> " + " ".join(f"user : {question} assistant : {answer} </s>" for question, answer in rounds)


def padded_inputs(setup, base):
    """The records as the family's own processor makes them, padded on the right."""
    pictures = [[Image.open(setup.folder / "images" / f"{n}.png") for n in numbers] for _, numbers in RECORDS]
    texts = [written(texts, setup.name) for texts, _ in RECORDS]
    flat = [image for own in pictures for image in own]
    if setup.name.startswith("qwen"):
        made = image_processor(setup.name)(flat, return_tensors="pt")
        lengths = (made["image_grid_thw"].prod(-1) // 4).tolist()
        texts = [text.replace("<image>", "<|vision_start|>IMAGE<|vision_end|>") for text in texts]
        for length in lengths:
            index = next(i for i, text in enumerate(texts) if "IMAGE" in text)
            texts[index] = texts[index].replace("IMAGE", "<|image_pad|>" * length, 1)
        made = {**made, **family_tokenizer(setup.name)(texts, padding=True, padding_side="right", return_tensors="pt")}
        made["mm_token_type_ids"] = (made["input_ids"] == base.config.image_token_id).int()
    elif setup.name == "internvl":
        made = image_processor(setup.name)(flat, return_tensors="pt")
        for count in made.pop("num_patches").tolist():
            index = next(i for i, text in enumerate(texts) if "<image>" in text)
            shown = " ".join(["<img>", *["<IMG_CONTEXT>"] * (4 * count), "</img>"])
            texts[index] = texts[index].replace("<image>", shown, 1)
        made = {**made, **tokenizer()(texts, padding=True, padding_side="right", return_tensors="pt")}
    else:
        processor = family_processor(setup.name)
        processor.tokenizer.padding_side = "right"
        images = [own for own in pictures if own] if setup.name == "llava_onevision" else flat
        made = processor(images=images, text=texts, padding=True, return_tensors="pt")
    return {key: value for key, value in made.items() if key != "token_type_ids"}


class FamilyRuns(Runs):
    """Training of a saved checkpoint of one family."""

    def __init__(self, folder, name):
        super().__init__(folder)
        self.model = save_checkpoint(name, folder / "model")

    def train(self, name, *overrides, **launch):
        template = "{user: 'user : {text}', assistant: ' assistant :', answer: ' {text}{eos}', separator: ' '}"
        own = (
            "model.config=null",
            f"model.path={self.model}",
            "model.train={projector: 5e-3, language_model: 5e-3, vision_tower: 1e-4}",
            f"data.template={template}",
            "data.max_length=400",
            "pruning.layers=[2, 4, 5]",
            "pruning.positions=keep",
            "train.max_steps=4",
            "deepspeed=configs/deepspeed/zero2.json",
        )
        return self.run(name, *own, *overrides, **launch)
