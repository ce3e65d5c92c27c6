"""Tiny real models and processors, built on the spot."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

WORDS = [
    "what",
    "is",
    "shown",
    "here",
    "a",
    "red",
    "blue",
    "round",
    "cat",
    "dog",
    "on",
    "the",
    "left",
    "right",
    "user",
    "assistant",
    ":",
    "?",
    ".",
    "yes",
    "no",
    "two",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
TILE, PATCH = 28, 7
PINPOINTS = [[28, 56], [56, 28], [56, 56], [28, 84], [84, 28]]
TEXT = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )


def tiny_config(text_type: str = "llama", num_layers: int = 6, kv_heads: int = 2, **text: Any) -> LlavaNextConfig:
    text_config = TEXT[text_type](
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=64,
        max_position_embeddings=2048,
        initializer_range=0.3,
        **text,
    )
    vision_config = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=TILE,
        patch_size=PATCH,
        initializer_range=0.3,
    )
    return LlavaNextConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_grid_pinpoints=PINPOINTS,
        image_token_id=SPECIAL.index("<image>"),
        image_seq_length=(TILE // PATCH) ** 2,
    )


def tiny_model(seed: int = 0, **config: Any) -> LlavaNextForConditionalGeneration:
    torch.manual_seed(seed)
    return LlavaNextForConditionalGeneration(tiny_config(**config)).float()


def tiny_image_processor(pinpoints: list[list[int]] = PINPOINTS) -> LlavaNextImageProcessorPil:
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, image_grid_pinpoints=pinpoints
    )


def tiny_processor() -> LlavaNextProcessor:
    return LlavaNextProcessor(
        image_processor=tiny_image_processor(),
        tokenizer=tiny_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


class Reads(TorchDispatchMode):
    """Ops on tensors of a device whose result or shape the host has to wait for, and ops that take tensors of the host
    beside them, which are copied there first."""

    NAMES = ("_local_scalar_dense", "nonzero", "unique", "is_nonzero", "masked_select", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type != "cpu" for tensor in tensors):
            name = func._schema.name.split("::")[-1]
            to_host = name == "_to_copy" and kwargs.get("device") == torch.device("cpu")
            mixed = any(tensor.device.type == "cpu" and tensor.dim() for tensor in tensors)
            if to_host or mixed or any(read in name for read in self.NAMES):
                self.seen.append(name)
        return func(*args, **kwargs)
