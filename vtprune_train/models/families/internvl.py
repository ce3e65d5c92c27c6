"""InternVL as transformers has it: the tiles of a picture lie in one run of image tokens."""

from vtprune_train.models.families.base import LLAMA_LIKE, Family

FAMILY = Family(
    title="InternVL",
    model_class="InternVLForConditionalGeneration",
    text_types=LLAMA_LIKE,
    run_is_one_image=True,
)
