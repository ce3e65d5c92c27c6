"""Draws the visual tokens that a pruned model keeps at each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vtprune_train.evaluation.answering import content_of, write_prompt
from vtprune_train.models import HFModule
from vtprune_train.models.forward.calls import is_pruned, state_of, unwrapped
from vtprune_train.models.forward.padded import kept_tokens, stage_layers
from vtprune_train.viz.draw import ImageStages, draw


def show(
    model: HFModule, processor: Any, images: Image.Image | Sequence[Image.Image], prompt: str = "What is shown?"
) -> Image.Image:
    """Draw which visual tokens a pruned model keeps in each stage::

        show(model, processor, image, "What is in the picture?").save("kept.png")

    Args:
        model: a pruned model.
        processor: the processor of the model.
        images: one RGB image or several.
        prompt: the question about the images; its last token ranks the visual tokens, as when generating the answer.

    Returns:
        An image with a column for each stage and a row for each input image; dropped tokens are faded. Notebooks
        display it.

    Raises:
        ValueError: the model is not pruned, there is no image, or the positions of this model's tokens in the image are
            not known.
    """
    if not is_pruned(model):
        raise ValueError("show draws what a pruned model keeps; call prune(model, method) first")
    model, images = unwrapped(model), [images] if isinstance(images, Image.Image) else images
    inputs = encode(processor, images, prompt, model.device)
    return draw(look(model, processor.image_processor, inputs, images), stage_names(model), prompt)


def look(
    model: HFModule, image_processor: Any, inputs: Mapping[str, Tensor], images: Sequence[Image.Image]
) -> list[ImageStages]:
    """Run a pruned model in evaluation mode and return the tokens that it keeps.

    Args:
        model: the pruned model; its mode is restored.
        image_processor: the model's image processor, which prepared the images.
        inputs: a batch from the processor, on the model's device, without labels.
        images: the images of all rows, in order.

    Raises:
        ValueError: the positions of the tokens of this family, or of these images, are unknown.
    """
    sizes = [(image.height, image.width) for image in images]
    places = state_of(model).family.places(model.config, image_processor, inputs, sizes)
    tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    if tokens != (counted := sum(len(image_places.kinds) for image_places in places)):
        raise ValueError(
            f"the prompt has {tokens} visual tokens, but images of {sizes} (height, width) have {counted}; use the "
            "image processor that was saved with the model"
        )
    was_training = model.training
    model.eval()
    kept = [image for row in kept_tokens(model, inputs) for image in row]
    model.train(was_training)
    return [
        ImageStages(image, image_places, [np.arange(len(image_places.kinds)), *stages])
        for image, image_places, stages in zip(images, places, kept, strict=True)
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
    processor: Any, images: Sequence[Image.Image], prompt: str, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Inputs of one row on ``device``: the images and the prompt, up to the beginning of the answer.

    Raises:
        ValueError: there is no image.
    """
    if not images:
        raise ValueError("there are no images to show; pass at least one")
    text = write_prompt(processor, content_of(processor), len(images), prompt)
    bos = processor.tokenizer.bos_token
    has_bos = bos is not None and text.startswith(bos)  # the template already adds it
    inputs = processor(images=list(images), text=text, return_tensors="pt", add_special_tokens=not has_bos)
    return {key: value.to(device) for key, value in inputs.items()}
