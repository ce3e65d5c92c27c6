"""A LLaVA-NeXT small enough for a laptop, with random weights, and a few synthetic images. The examples use them
when no ``--model`` is given. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)

COLORS = {"red": (214, 40, 40), "green": (44, 160, 60), "blue": (40, 80, 210), "yellow": (240, 210, 40)}
QUESTION = "What color is it?"
CHAT = (
    "{% for message in messages %}{% if message.role == 'assistant' %}ASSISTANT:{% generation %} "
    "{% for part in message.content %}{{ part.text }}{% endfor %}</s>{% endgeneration %}{% else %}USER: "
    "{% for part in message.content %}{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }} {% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PINPOINTS = [[112, 56], [56, 112], [112, 112]]


def tiny_llava_next() -> tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]:
    """A model with eight decoder layers, and its processor, with a tokenizer that is trained here."""
    tokenizer = _tokenizer()
    config = LlavaNextConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
        ),
        image_grid_pinpoints=PINPOINTS,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS
    )
    processor = LlavaNextProcessor(
        image_processor,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    return LlavaNextForConditionalGeneration(config), processor


def saved_llava_next(folder: str) -> tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]:
    """The same model, saved and loaded again: TRL loads reference models from the policy's folder."""
    model, processor = tiny_llava_next()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return LlavaNextForConditionalGeneration.from_pretrained(folder), processor


def conversations(count: int, columns: Callable[[str], dict[str, Any]]) -> Any:
    """A ``datasets`` dataset with the columns ``images``, ``prompt`` (a question about the image), and what ``columns``
    returns for the right answer."""
    import datasets  # the other examples do not need it

    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    rows = [{"images": [image], "prompt": [question], **columns(answer)} for image, answer in draw_samples(count)]
    return datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))


def said(answer: str) -> list[dict[str, Any]]:
    """An answer as TRL's conversational datasets hold it."""
    return [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def draw_samples(count: int) -> list[tuple[Image.Image, str]]:
    """Images of one color, and the name of that color."""
    sizes = [(56, 56), (112, 56), (56, 112)]
    names = list(COLORS)
    return [
        (Image.new("RGB", sizes[i % len(sizes)], COLORS[names[i % len(names)]]), names[i % len(names)])
        for i in range(count)
    ]


def _tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([f"USER: \n{QUESTION} ASSISTANT: {' '.join(COLORS)}"] * 10, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
