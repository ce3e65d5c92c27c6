"""Qwen3-VL: as Qwen2-VL; features of deeper vision layers enter behind the first decoder layers, and are gathered with
their tokens."""

from vtprune_train.models.families.base import VIDEO, Family, merged_grids, rope_index

FAMILY = Family(
    title="Qwen3-VL",
    model_class="Qwen3VLForConditionalGeneration",
    text_types=("qwen3_vl_text",),
    tower="model.visual",
    grids=merged_grids,
    three_part_positions=rope_index,
    refused=(("pixel_values_videos", VIDEO),),
)
