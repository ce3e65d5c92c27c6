"""Qwen2.5-VL: as Qwen2-VL, with another vision tower."""

from vtprune_train.models.families.base import VIDEO, Family, rope_index

FAMILY = Family(
    title="Qwen2.5-VL",
    model_class="Qwen2_5_VLForConditionalGeneration",
    text_types=("qwen2_5_vl_text",),
    three_part_positions=rope_index,
    refused=(("pixel_values_videos", VIDEO),),
)
