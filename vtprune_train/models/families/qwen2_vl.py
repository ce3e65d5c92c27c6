"""Qwen2-VL: pictures of any size; positions of (time, height, width) that stay with their tokens."""

from vtprune_train.models.families.base import VIDEO, Family, merged_grids, rope_index

FAMILY = Family(
    title="Qwen2-VL",
    model_class="Qwen2VLForConditionalGeneration",
    text_types=("qwen2_vl_text",),
    tower="model.visual",
    grids=merged_grids,
    three_part_positions=rope_index,
    refused=(("pixel_values_videos", VIDEO),),
)
