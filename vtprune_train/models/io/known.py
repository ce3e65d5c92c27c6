"""Sizes of well-known checkpoints, so that a dry run needs neither weights nor network.

Source: the ``config.json`` files of these repositories; for LLaVA-OneVision transformers' conversion script, which pads
the vocabulary of Qwen2 (152064 and two tokens) to a multiple of 64.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    SiglipVisionConfig,
)


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


_QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def _llava_onevision_7b() -> LlavaOnevisionConfig:
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    return LlavaOnevisionConfig(vision_config=vision, text_config=Qwen2Config(**_QWEN2_7B, vocab_size=152128))


def _qwen2_5_vl_7b() -> Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    }
    return Qwen2_5_VLConfig(
        text_config={**_QWEN2_7B, "vocab_size": 152064, "rope_parameters": rope}, vision_config=vision
    )


KNOWN_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "lmsys/vicuna-7b-v1.5": _vicuna_7b,
    "openai/clip-vit-large-patch14-336": _clip_large_336,
    "llava-hf/llava-1.5-7b-hf": _llava_1_5_7b,
    "llava-hf/llava-v1.6-vicuna-7b-hf": _llava_next_vicuna_7b,
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": _llava_onevision_7b,
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen2_5_vl_7b,
}
