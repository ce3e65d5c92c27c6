"""Image features of a call, from the family's own code, plus the per-image metadata the decoder needs."""

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
    """Image metadata attached to the feature tensor, because ``generate`` computes features first and passes them to
    ``forward`` later."""

    grids: Grids
    encoder: EncoderSignals | None


def get_image_features(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **kwargs: Any) -> Any:
    """Compute image features with the family's code, and record the token count, grid and vision-tower signals of each
    image in the current call."""
    inputs = by_name(original, args, kwargs)
    # If sizes are on the device, read each once and reuse it.
    inputs |= {key: _on_host(inputs[key]) for key in SIZES if inputs.get(key) is not None}
    as_tuple = inputs.get("return_dict") is False
    with reading(self, state.method) as read:
        features = original(**{**inputs, "return_dict": True})
    images = features.pooler_output
    lengths = state.family.image_lengths(images)
    encoders: list[EncoderSignals | None] = [None] * len(lengths)
    if read is not None:
        shown = required(state.family.patches, state.family.title)(self.config, inputs)
        if [len(index) for index, _ in shown] != lengths:
            raise ValueError(
                f"images have {lengths} visual tokens, but the config implies {[len(index) for index, _ in shown]}, so "
                "the vision tower's attention cannot be assigned to tokens; do not pass vision_feature_select_strategy "
                "or vision_aspect_ratio"
            )
        index = to_device(patch_index(shown, patches_per_tile(self.config)), images[0].device)
        encoders = list(per_image(read.signals(index), lengths))
    grids = _grids(self, state, inputs, lengths)
    if len(images) == len(lengths):
        notes = [_Seen(*known) for known in zip(grids, encoders, strict=True)]
        if isinstance(images, Tensor):  # stacked by some families; indexing creates a new tensor
            setattr(images, SEEN, notes)
        else:
            for image, note in zip(images, notes, strict=True):
                setattr(image, SEEN, note)
    if state.running.call is not None:
        note_images(state.running.call, state, images)
    return features.to_tuple() if as_tuple else features


def note_images(call: Call, state: State, images: Sequence[Tensor] | Tensor) -> None:
    """Record image lengths, grids and vision-tower signals in an open call."""
    call.image_lengths = state.family.image_lengths(list(images))
    if isinstance(images, Tensor):
        seen: list[_Seen] = images.__dict__.get(SEEN, [])
    else:
        seen = [image.__dict__[SEEN] for image in images if SEEN in image.__dict__]
    if len(seen) < len(call.image_lengths):
        if state.method is not None and state.method.needs.encoder_layers:
            raise ValueError(
                f"{state.method.name} needs the vision tower's attention, but the image features were not computed by "
                "this model's get_image_features; pass pixel_values instead"
            )
        return
    call.image_grids = [image.grids for image in seen]
    encoders = [image.encoder for image in seen if image.encoder is not None]
    call.encoder = joined(encoders) if encoders else None


def _grids(self: HFModule, state: State, inputs: dict[str, Any], lengths: list[int]) -> list[Grids]:
    """Token grids of each image; empty if the family defines no layout for this config."""
    try:
        grids = state.family.grids(self.config, inputs)
    except ValueError:
        grids = []
    if len(grids) != len(lengths):
        return [()] * len(lengths)
    fits = [
        sum(rows * columns for rows, columns in image_grids) == length
        for image_grids, length in zip(grids, lengths, strict=True)
    ]
    return [image_grids if fit else () for image_grids, fit in zip(grids, fits, strict=True)]


def _on_host(sizes: Tensor | Sequence[Any]) -> Tensor:
    """Convert image sizes from a processor (tensor, array, or list of tuples, arrays or tensors) to host values."""
    if isinstance(sizes, Tensor):
        return sizes.cpu()
    return torch.stack([torch.as_tensor(size).cpu() for size in sizes]) if len(sizes) else torch.zeros(0, 2)


def pack_image_features(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **kwargs: Any) -> Any:
    """Call the family's packing, but keep the returned lengths (unused by get_image_features) on the host, because a
    host-to-device copy would synchronize."""
    with _TensorsOnHost():
        return original(*args, **kwargs)


class _TensorsOnHost(TorchFunctionMode):
    """Context in which ``torch.tensor(...)`` creates tensors on the host, regardless of ``device``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor:
            kwargs = {key: value for key, value in kwargs.items() if key != "device"}
        return func(*args, **kwargs)
