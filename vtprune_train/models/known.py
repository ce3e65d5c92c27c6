"""Sizes of well-known checkpoints, so that a dry run needs neither weights nor network.

Source: the ``config.json`` files of these repositories.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig, PreTrainedConfig


def _vicuna_7b(vocab_size: int = 32000) -> LlamaConfig:
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


def _clip_large_336() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )


def _llava_1_5_7b() -> LlavaConfig:
    return LlavaConfig(
        text_config=_vicuna_7b(vocab_size=32064),
        vision_config=_clip_large_336(),
        image_token_index=32000,
        image_seq_length=576,
        tie_word_embeddings=False,
    )


def _llava_next_vicuna_7b() -> LlavaNextConfig:
    return LlavaNextConfig(
        text_config=_vicuna_7b(vocab_size=32064),
        vision_config=_clip_large_336(),
        image_token_index=32000,
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        image_seq_length=576,
        tie_word_embeddings=False,
    )


KNOWN_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "lmsys/vicuna-7b-v1.5": _vicuna_7b,
    "openai/clip-vit-large-patch14-336": _clip_large_336,
    "llava-hf/llava-1.5-7b-hf": _llava_1_5_7b,
    "llava-hf/llava-v1.6-vicuna-7b-hf": _llava_next_vicuna_7b,
}
