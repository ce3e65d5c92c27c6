"""Which visual tokens of an image a pruned model keeps at each stage, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaNextProcessor

from vtprune_train.evaluation.answering import content_of, write_prompt
from vtprune_train.models import HFModule
from vtprune_train.models.families.anyres import AnyRes
from vtprune_train.models.forward.padded import kept_tokens, stage_layers
from vtprune_train.viz.draw import ShownImage, draw
from vtprune_train.viz.places import anyres_places


def show(model: HFModule, processor: LlavaNextProcessor, pictures: Sequence[Image.Image], prompt: str) -> Image.Image:
    """Draw which tokens of ``pictures`` survive each stage of a pruned model, for example in a notebook.

    Args:
        model: pruned.
        processor: the model's.
        pictures: RGB.
        prompt: what is asked about them; its last token ranks the visual tokens, as in generating the answer.

    Raises:
        ValueError: no picture.
    """
    inputs = encode(processor, pictures, prompt, model.device)
    return draw(look(model, inputs, pictures), stage_names(model), prompt)


def look(model: HFModule, inputs: Mapping[str, Tensor], pictures: Sequence[Image.Image]) -> list[ShownImage]:
    """Run a pruned model in evaluation mode and see which tokens survive.

    Args:
        model: pruned; its mode is restored afterwards.
        inputs: a batch as the processor makes it, on the model's device, without labels.
        pictures: of all its rows, in order.
    """
    anyres = AnyRes.of(model.config)
    was_training = model.training
    model.eval()
    kept = [image for row in kept_tokens(model, inputs) for image in row]
    model.train(was_training)
    shown = []
    for picture, stages in zip(pictures, kept, strict=True):
        places = anyres_places(anyres, (picture.height, picture.width))
        shown.append(ShownImage(picture, places, [np.arange(len(places.kinds)), *stages]))
    return shown


def stage_names(model: HFModule) -> list[str]:
    """``stage 1, layers 0-7`` and so on of a pruned model."""
    names = []
    for number, layers in enumerate(stage_layers(model), start=1):
        if not layers:  # a drop before the decoder, or two at one place
            names.append(f"stage {number}, before {f'layer {layers.start}' if layers.start else 'the decoder'}")
            continue
        several = f"layers {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
        names.append(f"stage {number}, {several}")
    return names


def encode(
    processor: LlavaNextProcessor, pictures: Sequence[Image.Image], prompt: str, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """One row of inputs on ``device``: the pictures, then the prompt, up to where the answer begins.

    Raises:
        ValueError: no picture.
    """
    if not pictures:
        raise ValueError("there is no picture to show the tokens of; give at least one")
    text = write_prompt(processor, content_of(processor), len(pictures), prompt)
    bos = processor.tokenizer.bos_token
    has_bos = bos is not None and text.startswith(bos)  # written by the template
    made = processor(images=list(pictures), text=text, return_tensors="pt", add_special_tokens=not has_bos)
    return {key: value.to(device) for key, value in made.items()}
