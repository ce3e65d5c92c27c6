"""The images of a call: the family's own features, and what the decoder has to know of each image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vtprune_train.core.stream import to_device
from vtprune_train.models import HFModule
from vtprune_train.models.families.base import required
from vtprune_train.models.families.layout import Grids
from vtprune_train.models.forward.calls import Call, State, by_name
from vtprune_train.models.forward.encoder import joined, patch_index, patches_per_tile, per_image, reading
from vtprune_train.pruning.candidates import EncoderSignals

SEEN = "_vtprune_seen"
SIZES = ("image_grid_thw", "image_sizes", "batch_num_images")  # inputs of get_image_features that its code loops over


@dataclass(frozen=True)
class _Seen:
    """What an image's features do not say by themselves. It is an attribute of their tensor, because ``generate`` asks
    for the features first and passes them to ``forward`` later."""

    grids: Grids
    encoder: EncoderSignals | None


def get_image_features(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **kwargs: Any) -> Any:
    """The family's own features; an open call learns how many tokens each image has, where they lie and what the
    vision tower thought of them."""
    inputs = by_name(original, args, kwargs)
    # Where sizes are on the device, one read of each serves all that follows.
    inputs |= {key: _on_host(inputs[key]) for key in SIZES if inputs.get(key) is not None}
    as_tuple = inputs.get("return_dict") is False
    with reading(self, state.method) as read:
        features = original(**{**inputs, "return_dict": True})
    images = features.pooler_output
    lengths = state.family.image_lengths(images)
    encoders: list[EncoderSignals | None] = [None] * len(lengths)
    if read is not None:
        shown = required(state.family.patches, state.family.title)(self.config, inputs)
        if [len(own) for own, _ in shown] != lengths:
            raise ValueError(
                f"images of {lengths} visual tokens, where {[len(own) for own, _ in shown]} were expected from the "
                "config: the vision tower's attention cannot be told to tokens; leave vision_feature_select_strategy "
                "and vision_aspect_ratio to the config"
            )
        index = to_device(patch_index(shown, patches_per_tile(self.config)), images[0].device)
        encoders = list(per_image(read.signals(index), lengths))
    grids = _grids(self, state, inputs, lengths)
    if len(images) == len(lengths):
        notes = [_Seen(*known) for known in zip(grids, encoders, strict=True)]
        if isinstance(images, Tensor):  # of families that stack them: indexing makes a new tensor each time
            setattr(images, SEEN, notes)
        else:
            for image, note in zip(images, notes, strict=True):
                setattr(image, SEEN, note)
    if state.running.call is not None:
        note_images(state.running.call, state, images)
    return features.to_tuple() if as_tuple else features


def note_images(call: Call, state: State, images: Sequence[Tensor] | Tensor) -> None:
    """Note in an open call what is known of its images."""
    call.image_lengths = state.family.image_lengths(list(images))
    if isinstance(images, Tensor):
        seen: list[_Seen] = images.__dict__.get(SEEN, [])
    else:
        seen = [image.__dict__[SEEN] for image in images if SEEN in image.__dict__]
    if len(seen) < len(call.image_lengths):
        if state.method is not None and state.method.encoder_layers:
            raise ValueError(
                f"{state.method.name} reads the vision tower's attention, but the image features were not made by this "
                "model's get_image_features as it is; pass pixel_values"
            )
        return
    call.image_grids = [own.grids for own in seen]
    encoders = [own.encoder for own in seen if own.encoder is not None]
    call.encoder = joined(encoders) if encoders else None


def _grids(self: HFModule, state: State, inputs: dict[str, Any], lengths: list[int]) -> list[Grids]:
    """The rasters of each image; empty where the family has no layout for the model's settings."""
    try:
        grids = state.family.grids(self.config, inputs)
    except ValueError:
        grids = []
    if len(grids) != len(lengths):
        return [()] * len(lengths)
    fits = [sum(rows * columns for rows, columns in own) == length for own, length in zip(grids, lengths, strict=True)]
    return [own if fit else () for own, fit in zip(grids, fits, strict=True)]


def _on_host(sizes: Tensor | Sequence[Any]) -> Tensor:
    """Sizes as a processor may give them: a tensor or array, or a list of tuples, arrays or tensors."""
    if isinstance(sizes, Tensor):
        return sizes.cpu()
    return torch.stack([torch.as_tensor(size).cpu() for size in sizes]) if len(sizes) else torch.zeros(0, 2)


def pack_image_features(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **kwargs: Any) -> Any:
    """The family's own packing. The lengths that it returns beside the features, which ``get_image_features`` does not
    use, stay on the host: copying them to the device would wait for all that it has to do."""
    with _TensorsOnHost():
        return original(*args, **kwargs)


class _TensorsOnHost(TorchFunctionMode):
    """``torch.tensor(...)`` inside makes its tensor on the host, whatever device it is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor:
            kwargs = {key: value for key, value in kwargs.items() if key != "device"}
        return func(*args, **kwargs)
