"""Models on disk, in parts and as checkpoints."""

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, CLIPVisionModel, PreTrainedTokenizerFast

from tests.support.helpers import tiny_config, tiny_tokenizer
from vtprune_train.config.model import ModelConfig
from vtprune_train.models.io.build import build_model
from vtprune_train.models.io.tokenizer import load_tokenizer

TEXT_TYPES = ("llama", "mistral", "qwen2")


def save_parts(folder, text_type="llama", tied=False):
    """A language model with a tokenizer that lacks <image>, and a vision tower, as a hub would hold them."""
    config = tiny_config(text_type, tie_word_embeddings=tied)
    torch.manual_seed(1)
    language = AutoModelForCausalLM.from_config(config.text_config)
    language.save_pretrained(folder / "language")
    plain = tiny_tokenizer().backend_tokenizer.to_str().replace('"<image>"', '"<unused>"')
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(plain), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder / "language")
    tower = CLIPVisionModel(config.vision_config)
    tower.save_pretrained(folder / "tower")
    return language, tower


def from_parts(folder, **settings):
    return ModelConfig(
        language_model=str(folder / "language"),
        vision_tower=str(folder / "tower"),
        image_grid_pinpoints=[(28, 56), (56, 28), (56, 56)],
        **{"dtype": "float32", **settings},
    )


def built(config, folder):
    tokenizer = load_tokenizer(config, list, folder / "none")
    return build_model(config, tokenizer), tokenizer
