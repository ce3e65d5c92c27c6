"""Configs of well-known language models and vision towers, so that dry runs need neither weights nor network.

Source: the ``config.json`` files of these repositories.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedConfig


def vicuna_7b(vocab_size: int = 32000) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=vocab_size,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )


def clip_large_336() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )


def llava_vicuna_7b(
    config_class: type[PreTrainedConfig], image_token_index: int = 32000, **more: Any
) -> PreTrainedConfig:
    """Config of a llava-hf model with Vicuna 7B and CLIP."""
    return config_class(
        text_config=vicuna_7b(vocab_size=32064),
        vision_config=clip_large_336(),
        image_token_index=image_token_index,
        image_seq_length=576,
        tie_word_embeddings=False,
        **more,
    )


QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}

PARTS: dict[str, Callable[[], PreTrainedConfig]] = {
    "lmsys/vicuna-7b-v1.5": vicuna_7b,
    "openai/clip-vit-large-patch14-336": clip_large_336,
}
