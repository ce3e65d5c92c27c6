"""LLaVA-OneVision: LLaVA-NeXT's tiles, shrunk where a picture has too many."""

from vtprune_train.models.families.base import LLAMA_LIKE, VIDEO, Family

FAMILY = Family(
    title="LLaVA-OneVision",
    model_class="LlavaOnevisionForConditionalGeneration",
    text_types=LLAMA_LIKE,
    refused=(("pixel_values_videos", VIDEO),),
)
