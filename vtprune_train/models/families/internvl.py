"""InternVL as transformers has it: the tiles of a picture lie in one run of image tokens."""

from __future__ import annotations

from typing import Any

from vtprune_train.models.families.base import LLAMA_LIKE, Family


def _counting(config: Any) -> dict[str, Any]:
    vision = config.vision_config
    patches = [size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True)]
    return {"image_seq_length": int(patches[0] * patches[1] * config.downsample_ratio**2)}


FAMILY = Family(
    title="InternVL",
    model_class="InternVLForConditionalGeneration",
    text_types=LLAMA_LIKE,
    run_is_one_image=True,
    counting=_counting,
)
