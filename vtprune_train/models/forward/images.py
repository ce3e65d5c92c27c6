"""Features of the images and videos of a call, from the family's own code, plus the metadata that the decoder needs."""

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
from vtprune_train.models.families.layout import Grids, tokens_per_tile
from vtprune_train.models.forward.calls import Call, State, Visual, by_name
from vtprune_train.models.forward.encoder import joined, patch_index, patches_per_tile, per_image, reading
from vtprune_train.pruning.candidates import EncoderSignals

SEEN = "_vtprune_seen"
# Inputs whose values get_image_features and get_video_features iterate over on the host.
SIZES = ("image_grid_thw", "video_grid_thw", "image_sizes", "batch_num_images")


@dataclass(frozen=True)
class _Seen:
    """Metadata attached to the features of an image or video, because ``generate`` computes features first and passes
    them to ``forward`` later."""

    grids: Grids
    encoder: EncoderSignals | None = None
    frames: int = 0
    length: int = 0
    tile_tokens: tuple[int, ...] = ()


def get_image_features(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **kwargs: Any) -> Any:
    """Compute image features with the family's code, and record the token count, grid and vision-tower signals of each
    image in the current call."""
    if state.running.packed:
        return original(*args, **kwargs)
    inputs = _with_sizes_on_host(by_name(original, args, kwargs))
    as_tuple = inputs.get("return_dict") is False
    with reading(self, state, state.method) as read:
        features = original(**{**inputs, "return_dict": True})
    images = features.pooler_output
    lengths = state.family.image_lengths(images)
    encoders: list[EncoderSignals | None] = [None] * len(lengths)
    tile_tokens: list[tuple[int, ...]] = [()] * len(lengths)
    if read is not None and state.method is not None:
        shown = required(state.family.patches, state.family.title)(self.config, inputs)
        if [len(index) for index, _ in shown] != lengths:
            raise ValueError(
                f"images have {lengths} visual tokens, but the config implies {[len(index) for index, _ in shown]}, so "
                f"{state.method.name} cannot assign what it needs from the vision tower to tokens; do not pass "
                "vision_feature_select_strategy or vision_aspect_ratio"
            )
        index = to_device(patch_index(shown, patches_per_tile(self.config)), images[0].device)
        encoders = list(per_image(read.signals(index), lengths))
        tile_tokens = [tokens_per_tile(patches, patches_per_tile(self.config)) for patches in shown]
    grids = _grids(self, state, inputs, lengths)
    if len(images) == len(lengths):
        seen = zip(grids, encoders, tile_tokens, strict=True)
        _attach(images, [_Seen(grid, encoder, tile_tokens=tokens) for grid, encoder, tokens in seen])
    if state.running.call is not None:
        note_images(state.running.call, state, images)
    return features.to_tuple() if as_tuple else features


def get_video_features(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **kwargs: Any) -> Any:
    """Compute video features with the family's code, and record the token count and grids of each video in the current
    call.

    Raises:
        ValueError: the method reads or changes the vision tower.
    """
    if state.method is not None and (needed := state.method.needs.from_tower):
        raise ValueError(
            f"{state.method.name} needs {needed}, which is not available for videos; use a method that "
            "does not need it, for example divprune or cdpruner"
        )
    inputs = _with_sizes_on_host(by_name(original, args, kwargs))
    as_tuple = inputs.get("return_dict") is False
    call, state.running.call = state.running.call, None  # some families compute videos with get_image_features
    try:
        features = original(**{**inputs, "return_dict": True})
    finally:
        state.running.call = call
    videos = features.pooler_output
    layouts = required(state.family.videos, state.family.title)(self.config, inputs)
    _attach(videos, [_of_video(video, *layout) for video, layout in zip(videos, layouts, strict=True)])
    if call is not None:
        note_videos(call, videos)
    return features.to_tuple() if as_tuple else features


def _of_video(tokens: Tensor, grids: Grids, frames: int) -> _Seen:
    """The metadata of a video with these features; without grids if they do not fit. In transformers 5.17 the features
    have no newline, which the model adds later."""
    count, expected = tokens[..., 0].numel(), sum(rows * columns for rows, columns in grids)
    fits = count == expected or (count == expected - 1 and grids[-1] == (1, 1))
    return _Seen(grids if fits else (), frames=frames, length=expected if fits else count)


def _with_sizes_on_host(inputs: dict[str, Any]) -> dict[str, Any]:
    """If sizes are on the device, read each once and reuse it."""
    return inputs | {key: _on_host(inputs[key]) for key in SIZES if inputs.get(key) is not None}


def _attach(features: Sequence[Tensor] | Tensor, notes: Sequence[_Seen]) -> None:
    if isinstance(features, Tensor):  # stacked by some families; indexing creates a new tensor
        setattr(features, SEEN, list(notes))
        return
    for tokens, note in zip(features, notes, strict=True):
        setattr(tokens, SEEN, note)


def _attached(features: Sequence[Tensor] | Tensor) -> list[_Seen]:
    if isinstance(features, Tensor):
        notes: list[_Seen] = features.__dict__.get(SEEN, [])
        return notes
    return [tokens.__dict__[SEEN] for tokens in features if SEEN in tokens.__dict__]


def note_videos(call: Call, videos: Sequence[Tensor] | Tensor) -> None:
    """Record the token counts and grids of videos in an open call.

    Raises:
        ValueError: the features have no metadata, so the frames of the videos are unknown.
    """
    notes = _attached(videos)
    if len(notes) != len(videos):
        raise ValueError(
            f"the number of frames is known for {len(notes)} of {len(videos)} videos, because their features were not "
            "computed by get_video_features of this pruned model; pass pixel_values_videos instead"
        )
    call.videos = [Visual(note.length, note.grids, note.frames) for note in notes]


def expand_outputs(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **kwargs: Any) -> Any:
    """Called by ``generate`` with several sequences per prompt (transformers >= 5.18): repeats the features of images
    and videos, and their metadata in the same order.

    Stacked features are passed as a list of tensors, each with its metadata, because a stacked copy would lose it.
    With a shared prefill, the features are those of the rows that run.
    """
    inputs = by_name(original, args, kwargs)
    if state.running.shared is not None:
        return inputs["mm_encoder_output"]
    stacked = []
    for features in inputs["mm_encoder_output"].values():
        pooled = getattr(features, "pooler_output", None)
        if isinstance(pooled, Tensor) and (notes := _attached(pooled)):
            features.pooler_output = list(pooled.unbind(0))
            _attach(features.pooler_output, notes)
            stacked.append(features)
    outputs = original(**inputs)
    for features in stacked:
        notes = _attached(features.pooler_output)
        features.pooler_output = torch.stack(features.pooler_output)
        _attach(features.pooler_output, notes)
    return outputs


def note_images(call: Call, state: State, images: Sequence[Tensor] | Tensor) -> None:
    """Record image lengths, grids and vision-tower signals in an open call."""
    lengths, seen = state.family.image_lengths(list(images)), _attached(images)
    call.images = [Visual(length) for length in lengths]
    if len(seen) < len(lengths):
        if state.method is not None and (needed := state.method.needs.from_tower):
            raise ValueError(
                f"{state.method.name} needs {needed}, but the image features were not computed by "
                "this model's get_image_features; pass pixel_values instead"
            )
        return
    call.images = [
        Visual(length, image.grids, tile_tokens=image.tile_tokens) for length, image in zip(lengths, seen, strict=True)
    ]
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
