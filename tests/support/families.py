"""Tiny real models of every family, with their own transformers processors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationMixin,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SiglipVisionConfig,
)

from tests.support.helpers import PATCH, TILE, tiny_config, tiny_image_processor, tiny_model, tiny_processor
from vtprune_train import PyramidDrop

WORDS = [
    "what", "is", "shown", "here", "a", "red", "blue", "round", "cat", "dog", "on", "the", "left", "right", "user",
    "assistant", ":", "?", ".", "yes", "no", "two",
]  # fmt: skip
SPECIAL = [
    "<unk>", "<s>", "</s>", "<pad>", "<image>", "<video>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>", "<IMG_CONTEXT>", "<img>", "</img>",
]  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 2048, "initializer_range": 0.3,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": TILE, "patch_size": PATCH, "initializer_range": 0.3,
}  # fmt: skip
# Not as min_pixels and max_pixels, which change the class's own size in transformers 5.17.
QWEN_SIZE = {"shortest_edge": 28 * 28, "longest_edge": 84 * 84}
TOKEN_IDS = {"image_token_id": 8, "video_token_id": 9, "vision_start_token_id": 6, "vision_end_token_id": 7}


def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=SPECIAL[4:],
    )  # fmt: skip


def llava() -> Any:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), image_token_id=4,
        image_seq_length=(TILE // PATCH) ** 2,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def llava_onevision() -> Any:
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION), text_config=Qwen2Config(**TEXT), image_token_id=4, video_token_id=5,
        image_grid_pinpoints=[[28, 28], [28, 56], [56, 28], [56, 56], [84, 84]], vision_aspect_ratio="anyres_max_4",
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config)


def llava_next_video() -> Any:
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), image_token_id=4, video_token_id=5,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]], image_seq_length=(TILE // PATCH) ** 2,
    )  # fmt: skip
    return LlavaNextVideoForConditionalGeneration(config)


def qwen_vision(**more: Any) -> dict[str, Any]:
    return {
        "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "patch_size": PATCH,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "initializer_range": 0.3, **more,
    }  # fmt: skip


ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def qwen2_vl() -> Any:
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config={
            "depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": PATCH, "hidden_size": 32,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        **TOKEN_IDS,
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl() -> Any:
    vision = qwen_vision(window_size=28, fullatt_block_indexes=[1], tokens_per_second=2)
    config = Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=vision, **TOKEN_IDS)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> Any:
    vision = qwen_vision(deepstack_visual_indexes=[0, 1], num_position_embeddings=64)
    text = {**TEXT, "head_dim": 8, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **TOKEN_IDS)
    return Qwen3VLForConditionalGeneration(config)


def qwen3_5(attending: tuple[int, ...] = (1, 2, 3, 4, 5), **more: Any) -> Any:
    """Eight layers; those other than ``attending`` have linear attention. By default all that tests of every family
    rank with attend."""
    vision = qwen_vision(num_position_embeddings=64)
    rope = {**ROPE, "mrope_interleaved": True, "partial_rotary_factor": 0.5}
    kinds = ["full_attention" if layer in attending else "linear_attention" for layer in range(8)]
    linear = {
        "linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    }  # fmt: skip
    text = {
        **TEXT,
        "head_dim": 16,
        "rope_parameters": rope,
        "num_hidden_layers": 8,
        "layer_types": kinds,
        "vocab_size": 112,
        **linear,
        **more,
    }
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision, **TOKEN_IDS))


EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16,
}  # fmt: skip


def qwen3_5_moe() -> Any:
    config = qwen3_5(**EXPERTS).config.to_dict()
    config["text_config"]["model_type"] = "qwen3_5_moe_text"
    config["vision_config"]["model_type"] = "qwen3_5_moe_vision"
    return Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(**{**config, "model_type": "qwen3_5_moe"}))


def qwen3_vl_moe() -> Any:
    config = qwen3_vl().config.to_dict()
    experts = {key: size for key, size in EXPERTS.items() if not key.startswith("shared")}
    config["text_config"] |= {**experts, "model_type": "qwen3_vl_moe_text"}
    config["vision_config"]["model_type"] = "qwen3_vl_moe_vision"
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**{**config, "model_type": "qwen3_vl_moe"}))


def internvl() -> Any:
    vision = InternVLVisionConfig(**{**VISION, "image_size": [TILE, TILE], "patch_size": [PATCH, PATCH]})
    config = InternVLConfig(
        vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=10, downsample_ratio=0.5
    )
    return InternVLForConditionalGeneration(config)


def _picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    height, width = [(40, 70), (90, 30), (50, 50), (84, 84)][seed % 4]
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


FAMILIES = {
    "llava_next": lambda: tiny_model(),
    "llava": llava,
    "llava_onevision": llava_onevision,
    "llava_next_video": llava_next_video,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5_moe,
    "internvl": internvl,
}


def family_model(name: str, seed: int = 0) -> Any:
    """In float32 and evaluation mode, with weights large enough to make different tokens win."""
    torch.manual_seed(seed)
    model = FAMILIES[name]().float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1 and parameter.std() < 0.1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            assert parameter.isfinite().all(), parameter_name
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 3
    return model


class _WithoutVideo(LlavaOnevisionProcessor):
    """The video processor needs torchvision, which tests go without."""

    def check_argument_for_proper_class(self, *_: Any) -> None:
        pass


class _NextWithoutVideo(LlavaNextVideoProcessor):
    def check_argument_for_proper_class(self, *_: Any) -> None:
        pass


def family_processor(name: str) -> Any:
    if name == "llava_next":
        return tiny_processor()
    if name == "llava":
        images = CLIPImageProcessorPil(size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE})
        return LlavaProcessor(
            image_processor=images, tokenizer=tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, image_token="<image>",
        )  # fmt: skip
    if name == "llava_next_video":
        return _NextWithoutVideo(
            image_processor=tiny_image_processor([[28, 56], [56, 28], [56, 56]]), tokenizer=tokenizer(),
            video_processor=None, patch_size=PATCH, vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )  # fmt: skip
    assert name == "llava_onevision"
    pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56], [84, 84]]
    images = LlavaOnevisionImageProcessorPil(size={"height": TILE, "width": TILE}, image_grid_pinpoints=pinpoints)
    return _WithoutVideo(
        image_processor=images, tokenizer=tokenizer(), video_processor=None, num_image_tokens=16,
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_4",
    )  # fmt: skip


def family_inputs(name: str, texts: list[list[str | int]], side: str = "left") -> dict[str, torch.Tensor]:
    """Processor outputs of a batch: each sample is words, with a number where the picture of that number stands."""
    pictures = [_picture(part) for text in texts for part in text if isinstance(part, int)]
    if name in ("llava_next", "llava", "llava_onevision", "llava_next_video"):
        processor = family_processor(name)
        processor.tokenizer.padding_side = side
        joined = [" ".join("<image>" if isinstance(part, int) else part for part in text) for text in texts]
        made = processor(images=pictures or None, text=joined, return_tensors="pt", padding=True)
        return {key: value for key, value in made.items() if key != "token_type_ids"}
    made_tokenizer = tokenizer()
    made: dict[str, Any] = {}
    if name == "internvl":
        crop = CLIPImageProcessorPil(size={"height": TILE, "width": TILE}, do_center_crop=False)
        tiles = [_internvl_tiles(image) for image in pictures]
        if pictures:
            made["pixel_values"] = crop([t for own in tiles for t in own], return_tensors="pt")["pixel_values"]
        lengths = [len(own) * 4 for own in tiles]
        start, pad, end = "<img>", "<IMG_CONTEXT>", "</img>"
    else:
        images = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, size=QWEN_SIZE, temporal_patch_size=2)
        lengths = []
        if pictures:
            made = dict(images(pictures, return_tensors="pt"))
            lengths = (made["image_grid_thw"].prod(-1) // 4).tolist()
        start, pad, end = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
    rows = []
    for text in texts:
        row = []
        for part in text:
            row += [start, *[pad] * lengths.pop(0), end] if isinstance(part, int) else part.split()
        rows.append(made_tokenizer.convert_tokens_to_ids(row))
    width = max(len(row) for row in rows)
    padding = [[3] * (width - len(row)) for row in rows]
    left = side == "left"
    made["input_ids"] = torch.tensor([p + r if left else r + p for r, p in zip(rows, padding, strict=True)])
    ones = [([0] * len(p), [1] * len(r)) for r, p in zip(rows, padding, strict=True)]
    made["attention_mask"] = torch.tensor([p + r if left else r + p for p, r in ones])
    if name != "internvl" and pictures:
        made["mm_token_type_ids"] = (made["input_ids"] == TOKEN_IDS["image_token_id"]).int()
    return made


@contextmanager
def images_repeated(model: Any) -> Iterator[None]:
    """Around ``generate`` with several answers to rows of several images: refused before transformers 5.18, but for
    families that repeat them by themselves."""
    own = "_expand_inputs_for_generation" in type(model).__dict__
    if own or hasattr(GenerationMixin, "_expand_multimodal_outputs"):
        yield
        return
    with pytest.raises(ValueError, match=r"install transformers>=5\.18"):
        yield


def _internvl_tiles(image: Image.Image) -> list[Image.Image]:
    half = image.width // 2
    boxes = [(0, 0, half, image.height), (half, 0, image.width, image.height)]
    return [image.crop(box) for box in boxes[: 1 + image.width % 3 % 2]] + [image]


__all__ = ["FAMILIES", "family_inputs", "family_model", "family_processor", "tiny_config"]


HALF = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25))
BATCH = [
    [0, "what is shown here ? assistant :"],
    ["a red", 1, "and", 2, "two ? assistant :"],
    ["what is a dog ? assistant :"],
    [3, 0, "left ? yes"],
]
