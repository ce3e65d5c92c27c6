"""LLaVA-NeXT: a base tile and a grid of tiles, unpadded, with a newline feature behind every row."""

from vtprune_train.models.families.base import LLAMA_LIKE, Family

FAMILY = Family(title="LLaVA-NeXT", model_class="LlavaNextForConditionalGeneration", text_types=LLAMA_LIKE)
