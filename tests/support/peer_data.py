"""Tiny checkpoints and datasets for ms-swift and LLaMA-Factory, which read them from folders."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLVideoProcessor,
)

from tests.support.families import ROPE, TEXT, WORDS, qwen_vision
from tests.support.helpers import tiny_model, tiny_processor
from tests.support.trl_data import ANSWERS, draw_image

# Qwen2.5-VL's own ids, which both frameworks rely on.
QWEN_IDS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
QWEN_PATCHES = {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 28 * 28, "longest_edge": 112 * 112},
}


def save_llava_next(folder):
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)


def save_qwen2_5_vl(folder):
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "vocab_size": 151936, "rope_parameters": ROPE},
        vision_config={
            **qwen_vision(window_size=56, fullatt_block_indexes=[1], tokens_per_second=2),
            "patch_size": QWEN_PATCHES["patch_size"],
        },
        image_token_id=QWEN_IDS["<|image_pad|>"],
        video_token_id=QWEN_IDS["<|video_pad|>"],
        vision_start_token_id=QWEN_IDS["<|vision_start|>"],
        vision_end_token_id=QWEN_IDS["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    Qwen2_5_VLForConditionalGeneration(config).float().save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate(["<unk>", *WORDS])} | QWEN_IDS
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(QWEN_IDS)[1:],
    )
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(**QWEN_PATCHES),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**QWEN_PATCHES),
    ).save_pretrained(folder)


SAVE = {"llava_next": save_llava_next, "qwen2_5_vl": save_qwen2_5_vl}


def save_data(folder, count=8):
    """``data.jsonl`` for ms-swift; the same as ``data.json`` with ``dataset_info.json`` for LLaMA-Factory."""
    rows = []
    for seed in range(count):
        image = folder / f"{seed}.png"
        draw_image(seed).save(image)
        question = {"role": "user", "content": "<image>what is shown here ?"}
        answer = {"role": "assistant", "content": ANSWERS[seed % len(ANSWERS)]}
        rows.append({"messages": [question, answer], "images": [str(image)]})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data.json").write_text(json.dumps(rows))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "images": "images"}
    entry = {"file_name": "data.json", "formatting": "sharegpt", "columns": columns, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"pictures": entry}))
