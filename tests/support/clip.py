"""A tiny CLIP model with its tokenizer, as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from tests.support.helpers import PATCH, TILE

POSITIONS = 24  # fewer than some questions have


def byte_tokenizer() -> CLIPTokenizer:
    """One token for each byte, and one for each byte that ends a word."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])


def save_clip(folder: Path, hidden: int) -> Path:
    """Save a CLIP model whose vision tower has ``hidden`` channels."""
    words = byte_tokenizer()
    sizes: dict[str, Any] = {"num_attention_heads": 2, "num_hidden_layers": 2, "projection_dim": 8}
    text = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": len(words), "bos_token_id": words.bos_token_id}
    text |= {"eos_token_id": words.eos_token_id, "max_position_embeddings": POSITIONS}
    vision = {"hidden_size": hidden, "intermediate_size": 16, "image_size": TILE, "patch_size": PATCH}
    config = CLIPConfig(text_config={**sizes, **text}, vision_config={**sizes, **vision}, projection_dim=8)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        clip = CLIPModel(config)
        for parameter in clip.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    clip.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
