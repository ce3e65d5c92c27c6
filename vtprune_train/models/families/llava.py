"""LLaVA-1.5: one picture of a fixed size, one token a patch."""

from __future__ import annotations

from typing import Any

from transformers import CLIPImageProcessorPil, LlavaProcessor

from vtprune_train.flops import TowerGeometry
from vtprune_train.models.families.base import LLAMA_LIKE, Family, Loop
from vtprune_train.models.layouts.one_tile import OneTile
from vtprune_train.stream import IMAGE


def _image_processor(config: Any) -> CLIPImageProcessorPil:
    tile = config.vision_config.image_size
    return CLIPImageProcessorPil(size={"shortest_edge": tile}, crop_size={"height": tile, "width": tile})


def _processor(config: Any, tokenizer: Any, image_processor: Any) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_token=IMAGE,
        num_additional_image_tokens=1,
        chat_template=getattr(tokenizer, "chat_template", None),
    )


FAMILY = Family(
    title="LLaVA-1.5",
    model_class="LlavaForConditionalGeneration",
    text_types=LLAMA_LIKE,
    loop=Loop(
        model_type="llava",
        layout=lambda config, _: OneTile.of(config),
        tower=TowerGeometry.of,
        image_processor=_image_processor,
        processor=_processor,
        projector=("model.multi_modal_projector.",),
    ),
)
