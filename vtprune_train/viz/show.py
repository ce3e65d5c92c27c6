"""Draws the visual tokens that a pruned model keeps at each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vtprune_train.evaluation.answering import by_kind, content_of, in_order, write_prompt
from vtprune_train.evaluation.timing import is_visual
from vtprune_train.evaluation.videos import video_processor
from vtprune_train.models import HFModule
from vtprune_train.models.families.layout import ImageLayout
from vtprune_train.models.forward.calls import is_pruned, state_of, unwrapped
from vtprune_train.models.forward.padded import kept_tokens, stage_layers
from vtprune_train.models.io.video_processor import DecodedVideo, video_keywords
from vtprune_train.viz.draw import ImageStages
from vtprune_train.viz.draw_video import VideoStages, draw_all

Visual = Image.Image | DecodedVideo


def show(
    model: HFModule, processor: Any, images: Visual | Sequence[Visual], prompt: str = "What is shown?"
) -> Image.Image:
    """Draw which visual tokens a pruned model keeps in each stage::

        show(model, processor, image, "What is in the image?").save("kept.png")

    Args:
        model: a pruned model.
        processor: the processor of the model.
        images: one RGB image or several; or videos, opened with :func:`vtprune_train.evaluation.videos.open_video`.
        prompt: the question about the images; its last token ranks the visual tokens, as when generating the answer.

    Returns:
        An image. Each input image has a row with a column for each stage; each video has a row for each stage, with its
        frames side by side. Dropped tokens are faded. Notebooks display the image.

    Raises:
        ValueError: the model is not pruned, there is no image, or the positions of this model's tokens in the image are
            not known.
    """
    if not is_pruned(model):
        raise ValueError("show draws what a pruned model keeps; call prune(model, method) first")
    model, visuals = unwrapped(model), [images] if isinstance(images, Visual) else list(images)
    inputs = encode(processor, visuals, prompt, model.device)
    return draw_all(look_at(model, processor, inputs, visuals, prompt), stage_names(model), prompt)


def look_at(
    model: HFModule, processor: Any, inputs: Mapping[str, Tensor], visuals: Sequence[Visual], prompt: str
) -> list[ImageStages | VideoStages]:
    """:func:`look` at the images and videos of a ``prompt`` that :func:`encode` wrote."""
    layout = video_processor(processor).layout if by_kind(visuals)[1] else None
    return look(model, processor.image_processor, inputs, in_order(visuals, prompt), layout)


def look(
    model: HFModule,
    image_processor: Any,
    inputs: Mapping[str, Tensor],
    images: Sequence[Visual],
    layout: ImageLayout | None = None,
) -> list[Any]:
    """Run a pruned model in evaluation mode and return the tokens that it keeps.

    Args:
        model: the pruned model; its mode is restored.
        image_processor: the model's image processor, which prepared the images.
        inputs: a batch from the processor, on the model's device, without labels.
        images: the images and videos of all rows, in order.
        layout: the family's layout that sampled the videos; not needed without videos.

    Returns:
        :class:`~vtprune_train.viz.draw.ImageStages` of each image and
        :class:`~vtprune_train.viz.draw_video.VideoStages` of each video.

    Raises:
        ValueError: the positions of the tokens of this family, or of these images, are unknown.
    """
    pictures, videos = by_kind(images)
    sizes = [(image.height, image.width) for image in pictures]
    places = state_of(model).family.places(model.config, image_processor, inputs, sizes) if sizes else []
    tokens = int(is_visual(model.config, inputs["input_ids"]).sum())
    counted = sum(len(image_places.kinds) for image_places in places)
    if videos:
        assert layout is not None, "videos need the layout that sampled them"
        counted += sum(layout.video_tokens(video.clip).total for video in videos)
    if tokens != counted:
        raise ValueError(
            f"the prompt has {tokens} visual tokens, but images of {sizes} (height, width) have {counted}; use the "
            "image processor that was saved with the model"
        )
    was_training = model.training
    model.eval()
    kept = iter([spans for row in kept_tokens(model, inputs) for spans in row])
    model.train(was_training)
    left = iter(places)
    return [
        VideoStages.of(image, layout, kept)  # type: ignore[arg-type]
        if isinstance(image, DecodedVideo)
        else ImageStages(image, here := next(left), [np.arange(len(here.kinds)), *next(kept)])
        for image in images
    ]


def stage_names(model: HFModule) -> list[str]:
    """Headings of the stages of a pruned model, such as ``stage 1, layers 0-7``."""
    names = []
    for number, layers in enumerate(stage_layers(model), start=1):
        if not layers:  # a drop before the decoder, or two drops at the same layer
            names.append(f"stage {number}, before {f'layer {layers.start}' if layers.start else 'the decoder'}")
            continue
        several = f"layers {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
        names.append(f"stage {number}, {several}")
    return names


def encode(
    processor: Any, images: Sequence[Visual], prompt: str, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Inputs of one row on ``device``: the images, videos and the prompt, up to the beginning of the answer.

    Raises:
        ValueError: there is no image.
    """
    if not images:
        raise ValueError("there are no images to show; pass at least one")
    pictures, videos = by_kind(images)
    text = write_prompt(processor, content_of(processor), len(pictures), prompt, len(videos))
    bos = processor.tokenizer.bos_token
    has_bos = bos is not None and text.startswith(bos)  # the template already adds it
    keywords = {**({"images": pictures} if pictures else {}), **video_keywords(videos)}
    inputs = processor(**keywords, text=text, return_tensors="pt", add_special_tokens=not has_bos)
    return {key: torch.as_tensor(value).to(device) for key, value in inputs.items()}
