"""LLaVA-1.5: one picture of a fixed size, one token a patch."""

from vtprune_train.models.families.base import LLAMA_LIKE, Family

FAMILY = Family(title="LLaVA-1.5", model_class="LlavaForConditionalGeneration", text_types=LLAMA_LIKE)
