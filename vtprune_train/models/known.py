"""Sizes of well-known checkpoints, so that a dry run needs neither weights nor network.

Source: the ``config.json`` files of these repositories.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedConfig


def _vicuna_7b() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
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


KNOWN_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "lmsys/vicuna-7b-v1.5": _vicuna_7b,
    "openai/clip-vit-large-patch14-336": _clip_large_336,
}
